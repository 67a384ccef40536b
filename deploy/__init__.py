"""Running and checking the deployment; none of it is installed with the package."""
