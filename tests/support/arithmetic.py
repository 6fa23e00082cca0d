"""What the fake engines share: how a bias, a least length and a prompt's log-probabilities come out, by hand."""

from xlane.engine import Request, TokenOutput

PREFERRED_LOGIT = 10.0


def choose(request: Request, preferred: int, generated: int, vocab_size: int) -> int:
    """The token after `generated` others: `preferred` has a logit of 10 and all others have 0, biases are added, stop
    ids are out while fewer than `min_tokens` are there. The largest wins, of equals the smallest id."""
    sampling = request.sampling
    barred = sampling.stop_ids if generated < sampling.min_tokens else ()
    if not sampling.logit_bias and preferred not in barred:
        return preferred
    bias = dict(sampling.logit_bias)

    def logit(token: int) -> float:
        return bias.get(token, 0.0) + (PREFERRED_LOGIT if token == preferred else 0.0)

    return max((token for token in range(vocab_size) if token not in barred), key=logit)


def prompt_outputs(request: Request, vocab_size: int) -> tuple[TokenOutput, ...]:
    """Token i of the prompt (from 1) has log-probability -i / 8; alternative j (from 0) is the id j above it, at
    -(i + j) / 8, so that the first is the token itself."""
    if request.prompt_logprobs is None:
        return ()
    return tuple(
        TokenOutput(
            token,
            -i / 8,
            tuple(((token + j) % vocab_size, -(i + j) / 8) for j in range(request.prompt_logprobs)),
        )
        for i, token in enumerate(request.prompt_ids)
        if i > 0
    )
