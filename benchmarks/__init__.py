"""The evidence: what FedBT costs and is worth, measured, stored and put into the pages."""
