"""What `dev.py evaluate` is made of: settings, rendering, features, measures, and the report."""
