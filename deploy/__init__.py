"""Runs and checks the deployment. Not installed with the package."""
