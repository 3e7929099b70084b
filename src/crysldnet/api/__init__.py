"""The Python API: commands as functions, and scikit-learn estimators."""
