"""The package from Python: commands as functions, and estimators for scikit-learn."""
