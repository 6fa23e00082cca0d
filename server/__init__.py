"""Text and HTTP: schemas, chat templates, streaming, metrics, command line. Knows JSON and strings, never jax."""
