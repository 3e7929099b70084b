"""Published data sets: definitions, downloads, and conversion to stores."""
