"""What deploys the product: proxies, systemd units, the Helm chart. `make test-deployment`."""
