"""Published data sets: what they are, how they are fetched, and how they become stores."""
