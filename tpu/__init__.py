"""What is special about an accelerator: device tables, run-time flags, start-up of hosts. Knows no requests."""
