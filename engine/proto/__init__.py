"""The wire form of the client seam: xlane.proto and what protoc made of it."""
