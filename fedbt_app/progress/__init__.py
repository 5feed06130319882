"""The lines by which a run tells how far it is, and the view that is drawn from them."""
