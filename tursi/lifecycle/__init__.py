"""What becomes of one worker: its states, why its lives end, and what follows from that."""
