"""The agent: a worker daemon.  It reserves ids, hands each to a child process, and answers for it until it ends."""
