"""What the families with experts share. Knows no architecture by itself."""

from .hf import Fields


def skip_training(fields: Fields) -> None:
    """Keys of a router's training."""
    fields.skip("router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "input_jitter_noise")


def sparse_layers(fields: Fields) -> tuple[bool, ...]:
    """Qwen's: which layers have experts; empty where all have."""
    layers, step = fields.integer("num_hidden_layers"), fields.integer("decoder_sparse_step", 1)
    dense = fields.ids("mlp_only_layers")
    found = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    return () if all(found) else found
