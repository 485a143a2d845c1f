"""Makes ``twistd tursi`` known to Twisted; imports nothing of ours."""

from twisted.application.service import ServiceMaker

tursi = ServiceMaker("tursi", "tursi.tap", "Serve AI models on your own machines.", "tursi")
