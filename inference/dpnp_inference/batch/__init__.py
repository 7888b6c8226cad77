"""Many measurements: items are claimed one by one by however many processes there are, wherever they run."""
