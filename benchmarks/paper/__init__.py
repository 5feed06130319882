"""The tables of the paper: cells, each a whole run of the product."""
