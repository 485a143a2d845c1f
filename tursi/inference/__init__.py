"""The worker process: loads one model and answers requests over one socket.

The only code that imports torch and transformers, and it does so late: what
runs before the model is loaded must start at once.
"""
