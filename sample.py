"""Makes a talking video.

python sample.py --image portrait.png --audio voice.wav --prompt "A puppet nods." --out talk.mp4

Without --image, --audio or --prompt it takes a puppet, a sentence and a prompt of its own.
"""

import sys

from emv3_jax import command_line, media
from emv3_jax.errors import UserError


def make_parser() -> command_line.Parser:
    parser = command_line.make_parser("sample.py", __doc__, config="configs/demo.py")
    parser.add_argument("--image", help="portrait: PNG, JPEG or WebP")
    parser.add_argument("--audio", help="voice: WAV, FLAC, MP3 or Ogg, any rate")
    parser.add_argument("--prompt", help="what the puppet does, how it looks, what the camera does")
    parser.add_argument("--out", default="out/demo.mp4", help="the video (default: out/demo.mp4)")
    parser.add_argument("--sheet", help="also a contact sheet, a PNG (default: out/demo.png when --out is not given)")
    parser.add_argument(
        "--face",
        help="where the voice may act: y1,y2,x1,x2 in pixels of the image, or a .npy box (default: everywhere)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    return parser


def parse_face(text: str | None) -> tuple[float, float, float, float] | str | None:
    """ "y1,y2,x1,x2" -> four numbers; the path of a .npy file stays one."""
    if text is None:
        return None
    if text.lower().endswith(".npy"):
        media.check_readable(text, "face box")
        return text
    try:
        y1, y2, x1, x2 = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--face must be four numbers y1,y2,x1,x2 in pixels or a .npy file, got {text!r}") from None
    return y1, y2, x1, x2


def main(arguments: list[str]) -> int:
    options, cfg = command_line.parse(make_parser(), arguments)
    out = media.check_writable(options.out, (".mp4",))
    sheet = options.sheet or ("out/demo.png" if options.out == "out/demo.mp4" else None)
    if sheet:
        sheet = media.check_writable(sheet, (".png",))
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed must be between 0 and {2**32 - 1}, got {options.seed}")
    face = parse_face(options.face)
    if options.image is not None:
        media.check_readable(options.image, "image")
    if options.audio is not None:
        media.check_readable(options.audio, "recording")

    # From here on JAX is imported, which takes seconds. What is still unchecked is what the files hold, the prompt and
    # the config's values; that is done before any weights are read.
    from emv3_jax import demo, pipeline

    command_line.setup_compile_cache()
    request = demo.fill(options.image, options.audio, options.prompt, face, options.seed, cfg)
    sampling = pipeline.SamplingOptions(**cfg.sampling)
    preset = demo.preset(cfg)
    words = pipeline.load_tokenizer(preset.name, cfg.weights or None)
    ready = pipeline.read_request(request, preset, words)
    for note in ready.notes:
        print(f"note: {note}")
    demo.render(ready, sampling, cfg, out, sheet)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
