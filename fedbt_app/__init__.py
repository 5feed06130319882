"""FedBT: adapt one BERT across sites, training and exchanging only selected encoder blocks."""
