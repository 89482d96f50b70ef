import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emv3_jax import attention as attn


def qkv(length: int, context: int, heads: int = 2, width: int = 8, batch: int = 2) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(batch, n, heads, width) for n in (length, context, context)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def test_plain_attention_by_hand():
    """Equal logits average the values; a huge logit picks one; the mask removes one."""
    v = jnp.asarray([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1)
    q = jnp.ones((1, 1, 1, 1))
    np.testing.assert_allclose(attn.attention(q, jnp.zeros((1, 3, 1, 1)), v), [[[[3.0]]]], rtol=1e-6)
    k = jnp.asarray([0.0, 100.0, 0.0]).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(attn.attention(q, k, v), [[[[2.0]]]], rtol=1e-6)
    mask = jnp.asarray([True, True, False]).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(attn.attention(q, jnp.zeros((1, 3, 1, 1)), v, mask), [[[[1.5]]]], rtol=1e-6)


def test_chunked_equals_plain_with_gradients():
    args = qkv(37, 21)
    weight = jax.random.normal(jax.random.key(1), args[0].shape)

    def run(fn):
        return jax.jit(jax.value_and_grad(lambda args: jnp.sum(weight * fn(*args))))(args)

    value, gradient = run(attn.plain_attention)
    chunked, gradient_chunked = run(lambda q, k, v: attn.chunked_attention(q, k, v, chunk=8))
    np.testing.assert_allclose(chunked, value, rtol=1e-5)
    for a, b in zip(gradient, gradient_chunked, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_long_sequences_use_little_memory():
    """4096 tokens: the whole weights would be 2 x 2 x 4096 x 4096 x 4 bytes = 268 MB."""
    shapes = [jax.ShapeDtypeStruct((2, 4096, 2, 8), jnp.float32)] * 3
    compiled = jax.jit(attn.attention).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 80e6
    args = qkv(attn.LONG + 1, 16)
    np.testing.assert_allclose(jax.jit(attn.attention)(*args), attn.plain_attention(*args), atol=1e-5)


@pytest.mark.parametrize(("length", "context"), [(130, 257), (300, 17)])
def test_splash_equals_plain(length: int, context: int):
    args = qkv(length, context, heads=1, width=128, batch=1)
    got = attn.splash_attention(*args, interpret=True)
    np.testing.assert_allclose(got, attn.plain_attention(*args), atol=2e-5)


def test_splash_gradients_are_those_of_plain():
    args = qkv(130, 140, heads=1, width=128, batch=1)
    weight = jax.random.normal(jax.random.key(1), args[0].shape)
    grads = [
        jax.grad(lambda args, fn=fn: jnp.sum(weight * fn(*args)))(args)
        for fn in (lambda *a: attn.splash_attention(*a, interpret=True), attn.plain_attention)
    ]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_on_this_machine_the_platform_switch_runs_and_differentiates():
    """Wide heads and 1024 queries put splash attention into the program; the CPU takes the plain form."""
    args = qkv(1024, 32, heads=1, width=128, batch=1)
    value, gradient = jax.jit(jax.value_and_grad(lambda args: jnp.sum(attn.attention(*args) ** 2)))(args)
    want, want_gradient = jax.value_and_grad(lambda args: jnp.sum(attn.plain_attention(*args) ** 2))(args)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for a, b in zip(gradient, want_gradient, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
