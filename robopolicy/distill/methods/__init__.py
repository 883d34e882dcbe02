"""One file per method: what it asks of the student's network, and its loss."""
