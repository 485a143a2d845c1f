"""Everything between the daemon and its child processes."""
