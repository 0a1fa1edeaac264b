"""Drawing runs that can be killed, shared and resumed."""
