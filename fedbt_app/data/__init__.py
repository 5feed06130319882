"""From a data set's name to one client's examples."""
