"""What each on-policy method does differently: how it explores, and what it takes for the ratio of new to old policy."""
