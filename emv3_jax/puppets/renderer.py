"""Draws puppets: anti-aliased shapes from signed distances, as one pure JAX function of identity, pose and pixel grid.

Axes: B clips, F frames, H W pixels. Coordinates are picture heights: x from the middle, y from the top, down.
Since a pixel's colour depends on its coordinates alone, a crop costs only its own pixels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from emv3_jax.puppets.world import MOUTH_INTERIOR, Identity, Pose

PARTS = ("background", "clothes", "skin", "hair", "mouth", "face", "hand")
HEAD_Y = 0.44
MOUTH_DROP = 0.135  # from the middle of the head to the middle of the mouth
MOUTH_OPEN = 0.085  # half height of the widest open mouth
WHITE = np.array([0.98, 0.98, 0.97], np.float32)
TONGUE = np.array([0.78, 0.25, 0.30], np.float32)


def pixel_grid(height: int, width: int) -> np.ndarray:
    """[H, W, 2] (x, y) coordinates of the pixel centres."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return np.stack([(x + 0.5 - width / 2) / height, (y + 0.5) / height], -1)


def _ellipse(p, centre_x, centre_y, radius_x, radius_y):
    """Signed distance to an ellipse, accurate near its edge."""
    x, y = p[..., 0] - centre_x, p[..., 1] - centre_y
    k0 = jnp.sqrt((x / radius_x) ** 2 + (y / radius_y) ** 2 + 1e-9)
    k1 = jnp.sqrt((x / radius_x**2) ** 2 + (y / radius_y**2) ** 2 + 1e-9)
    return k0 * (k0 - 1.0) / k1


def _capsule(p, ax, ay, bx, by, radius):
    """Signed distance to a thick line from a to b."""
    px, py, dx, dy = p[..., 0] - ax, p[..., 1] - ay, bx - ax, by - ay
    along = jnp.clip((px * dx + py * dy) / (dx * dx + dy * dy + 1e-9), 0.0, 1.0)
    return jnp.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2 + 1e-12) - radius


class _Canvas:
    """Paints shapes one over another; keeps how much of each part is seen at a pixel."""

    def __init__(self, rgb, pixel):
        self.rgb, self.pixel = rgb, pixel
        self.parts = [jnp.ones(rgb.shape[:-1])] + [jnp.zeros(rgb.shape[:-1])] * (len(PARTS) - 1)

    def paint(self, distance, colour, part, soft=1.0, opacity=1.0):
        cover = jnp.clip(0.5 - distance / (self.pixel * soft), 0.0, 1.0) * opacity
        self.rgb = self.rgb + cover[..., None] * (colour - self.rgb)
        if part is not None:
            self.parts = [seen * (1.0 - cover) for seen in self.parts]
            self.parts[PARTS.index(part)] = self.parts[PARTS.index(part)] + cover


def _body(canvas, p, who: Identity, pose: Pose):
    neck = 0.88 * who.skin
    body_x = pose.body_x
    canvas.paint(_capsule(p, body_x + 0.6 * pose.head_x, 0.62, body_x, 0.84, 0.070), neck, "skin")
    canvas.paint(_ellipse(p, body_x, 1.06, who.shoulder, 0.29), who.clothes, "clothes")
    collar = jnp.maximum(_ellipse(p, body_x, 0.775, 0.105, 0.075), 0.775 - p[..., 1])
    canvas.paint(collar, 0.78 * who.clothes, "clothes")
    canvas.paint(_ellipse(p, body_x, 0.770, 0.082, 0.050), neck, "skin")
    for y in (0.885, 0.955):
        canvas.paint(_ellipse(p, body_x, y, 0.014, 0.014), 0.65 * who.clothes, None)


def _hand(canvas, p, who: Identity, pose: Pose):
    up = pose.hand_raise
    elbow_x, elbow_y = pose.body_x + 0.345 + 0.02 * up, 0.945 - 0.06 * up
    angle = -0.35 + 0.13 * up + pose.hand_swing
    reach = 0.10 + 0.13 * up
    hand_x, hand_y = elbow_x + reach * jnp.sin(angle), elbow_y - reach * jnp.cos(angle)
    sleeve = 0.88 * who.clothes
    canvas.paint(_capsule(p, pose.body_x + 0.24, 0.93, elbow_x, elbow_y, 0.055), sleeve, "clothes")
    canvas.paint(_capsule(p, elbow_x, elbow_y, 0.6 * hand_x + 0.4 * elbow_x, 0.6 * hand_y + 0.4 * elbow_y, 0.048),
                 sleeve, "clothes")  # fmt: skip
    canvas.paint(_ellipse(p, hand_x, hand_y, 0.062, 0.062), who.skin, "hand")
    thumb_x, thumb_y = hand_x - 0.055 * jnp.cos(angle) + 0.02 * jnp.sin(angle), hand_y - 0.03
    canvas.paint(_ellipse(p, thumb_x, thumb_y, 0.026, 0.026), who.skin, "hand")


def _face(canvas, p, who: Identity, pose: Pose, x, y):
    """Eyes, brows, nose and cheeks around the point (x, y)."""
    lid = jnp.clip(pose.eye_open * (1.0 - 0.92 * pose.blink), 0.08, 1.4)
    brow = 0.62 * who.hair
    for side in (-1.0, 1.0):
        eye_x, eye_y = x + side * who.eye_gap, y - 0.035
        size = who.eye_size
        canvas.paint(_ellipse(p, x + side * 0.145, y + 0.075, 0.045, 0.032), jnp.array([0.96, 0.45, 0.45]), None,
                     soft=3.0, opacity=0.35)  # fmt: skip
        white = _ellipse(p, eye_x, eye_y, size, size * 1.12 * lid)
        canvas.paint(white, WHITE, "face")
        look_x = eye_x + 0.25 * pose.turn
        canvas.paint(jnp.maximum(_ellipse(p, look_x, eye_y, 0.62 * size, 0.62 * size), white), who.iris, "face")
        canvas.paint(jnp.maximum(_ellipse(p, look_x, eye_y, 0.36 * size, 0.36 * size), white), 0.06 * WHITE, "face")
        canvas.paint(_ellipse(p, look_x - 0.014, eye_y - 0.016 * lid, 0.010, 0.010 * lid), WHITE, None)
        brow_y = eye_y - 0.082 - pose.brow_raise
        lean = 0.040 * pose.brow_slope * side
        canvas.paint(_capsule(p, eye_x - 0.042, brow_y + lean, eye_x + 0.042, brow_y - lean, 0.013), brow, "face")
    canvas.paint(_ellipse(p, x, y + 0.030, 0.028, 0.022), 0.86 * who.skin, None)


def _mouth(canvas, p, who: Identity, pose: Pose, x, y):
    """The mouth: an opening between lips, whose height and width follow the law."""
    half_width = 0.052 + 0.046 * pose.mouth_width
    half_height = MOUTH_OPEN * pose.mouth_height
    bend = pose.smile * 3.2 * ((p[..., 0] - x) ** 2 - 0.45 * half_width**2)
    q = jnp.stack([p[..., 0], p[..., 1] + bend], -1)
    lips = 0.45 * who.skin + 0.55 * jnp.array([0.80, 0.22, 0.27])
    canvas.paint(_ellipse(q, x, y, half_width + 0.019, half_height + 0.019), lips, "face")
    inside = _ellipse(q, x, y, half_width, half_height + 0.004)
    canvas.paint(inside, MOUTH_INTERIOR, "mouth")
    tongue = _ellipse(q, x, y + half_height * 0.92, 0.62 * half_width, 0.42 * half_height + 1e-3)
    canvas.paint(jnp.maximum(tongue, inside + 0.008), TONGUE, None, opacity=jnp.clip(pose.mouth_height * 2, 0.0, 0.75))


def _frame(who: Identity, pose: Pose, grid, pixel):
    """One frame: grid [H, W, 2] -> rgb [H, W, 3] in [0, 1], parts [H, W, len(PARTS)]."""
    p = jnp.stack([grid[..., 0] / pose.zoom, HEAD_Y + (grid[..., 1] - HEAD_Y) / pose.zoom], -1)
    pixel = pixel / pose.zoom
    down = jnp.clip(p[..., 1:2], 0.0, 1.0)
    canvas = _Canvas(who.background_top * (1 - down) + who.background_bottom * down, pixel)
    canvas.paint(_ellipse(p, who.disc_centre[0], who.disc_centre[1], 0.17, 0.17), who.disc_colour, None, opacity=0.6)
    canvas.paint(_ellipse(p, -0.8 * who.disc_centre[0], 0.62, 0.10, 0.10), who.disc_colour, None, opacity=0.4)

    x, y = pose.body_x + pose.head_x, HEAD_Y + pose.head_y
    w, h = who.head_width, who.head_height
    behind = _ellipse(p, x, y - 0.03 + 0.5 * who.hair_length, w + who.hair_back, 0.92 * h + 0.5 * who.hair_length)
    canvas.paint(behind, 0.80 * who.hair, "hair")
    bun = _ellipse(p, x, y - h - 0.035, 0.095 * who.bun + 1e-3, 0.085 * who.bun + 1e-3)
    canvas.paint(bun, 0.90 * who.hair, "hair", opacity=jnp.minimum(1.0, 4 * who.bun))
    _body(canvas, p, who, pose)
    for side in (-1.0, 1.0):
        canvas.paint(_ellipse(p, x + side * w * 0.97, y + 0.015, 0.045, 0.058), 0.92 * who.skin, "skin")
    head = _ellipse(p, x, y, w, h)
    canvas.paint(head, who.skin, "skin")
    face_x, face_y = x + pose.turn, y + pose.tilt
    _face(canvas, p, who, pose, face_x, face_y)
    _mouth(canvas, p, who, pose, face_x, face_y + MOUTH_DROP)
    cap = _ellipse(p, x, y - 0.012, w + 0.022, h + 0.028)
    edge = y + who.fringe + 0.5 * pose.tilt + who.parting * (p[..., 0] - face_x) * 0.5 + 1.6 * (p[..., 0] - face_x) ** 2
    canvas.paint(jnp.maximum(cap, p[..., 1] - edge), who.hair, "hair")
    _hand(canvas, p, who, pose)
    return jnp.clip(canvas.rgb, 0.0, 1.0), jnp.stack(canvas.parts, -1)


@functools.partial(jax.jit, static_argnames=("pixel", "parts"))
def render(who: Identity, pose: Pose, grid, pixel: float, parts: bool = False):
    """Draws a clip on any pixel grid.

    Args:
      who: an Identity.
      pose: a Pose with leaves [F].
      grid: [H, W, 2] or [F, H, W, 2] coordinates of pixels (`pixel_grid`, or a crop of it).
      pixel: the side of a pixel, 1 / (height of the whole picture).
      parts: also return how much of each of PARTS is seen at each pixel.
    Returns:
      video [F, H, W, 3] in [-1, 1]; with `parts` also [F, H, W, len(PARTS)] in [0, 1].
    """
    rgb, seen = jax.vmap(_frame, in_axes=(None, 0, 0 if grid.ndim == 4 else None, None))(who, pose, grid, pixel)
    return (2.0 * rgb - 1.0, seen) if parts else 2.0 * rgb - 1.0


def render_clip(who: Identity, pose: Pose, height: int = 64, width: int = 64, parts: bool = False):
    """`render` on the whole picture."""
    return render(who, pose, pixel_grid(height, width), 1.0 / height, parts)


render_batch = jax.jit(jax.vmap(render, in_axes=(0, 0, 0, None)), static_argnums=(3,))
"""`render` for B identities [B, ...], poses [B, F] and grids [B, H, W, 2] -> [B, F, H, W, 3]."""
