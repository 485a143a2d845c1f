"""Makes ``twistd scripted`` known: ``twistd tursi`` with scripted workers instead of models."""

from twisted.application.service import ServiceMaker

scripted = ServiceMaker("scripted", "scripted_tap", "Tursi with scripted workers.", "scripted")
