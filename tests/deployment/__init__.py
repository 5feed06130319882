"""Real SuperLinks and SuperNodes on loopback, over TLS and with node authentication, and what befalls them."""
