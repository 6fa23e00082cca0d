"""One file per family of architectures: how its config.json reads and where its weights lie. Data, no layers."""
