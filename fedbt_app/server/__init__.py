"""What the server does: rounds, who takes part, the global state, and how a run goes on after a
stop.
"""
