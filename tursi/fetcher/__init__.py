"""The process that downloads a model: network and the hub's token, but no torch and no Twisted.

Started as ``python -I -m tursi.fetcher REPOSITORY REVISION CACHE``; it speaks
frames of ``tursi.wire`` on descriptor 3 (PROGRESS, then READY or FAILED) and
exits.
"""
