"""Makes a talking video, or many of them.

python sample.py --image portrait.png --audio voice.wav --prompt "A puppet nods." --out talk.mp4
python sample.py --config configs/preview.py --image me.jpg --audio voice.wav --prompt "0-3s: ...; 3-9s: ..."
python sample.py --manifest jobs.jsonl

With the demo's config, a picture, a voice and a prompt that are not given are its own. Beside the video stands a JSON
file that says how it was made. A manifest is a .jsonl or .csv file, a row a video, whose columns are named like the
options below (image, audio, prompt, seed, task, out, ...), like keys of the config's section sampling (steps, ...), or
frames, fps or match_colours.
"""

import pathlib
import sys

from emv3_jax import command_line, manifest


def make_parser() -> command_line.Parser:
    parser = command_line.make_parser("sample.py", __doc__, config="configs/demo.py")
    parser.add_argument("--image", help="portrait: PNG, JPEG or WebP")
    parser.add_argument("--audio", help="voice: WAV, FLAC, MP3 or Ogg, any rate (lipsync: default the video's own)")
    parser.add_argument("--prompt", help='what is to be seen; over time: "0-4s: ...; 4-9s: ..."')
    parser.add_argument("--task", default="i2v", help="i2v, t2v, flf2v (with --last-image) or lipsync (with --video)")
    parser.add_argument("--last-image", help="flf2v: the last frame")
    parser.add_argument("--video", help="lipsync: the video whose mouth is to speak")
    parser.add_argument("--mouth", help="lipsync: the box that changes, y1,y2,x1,x2 in pixels of the video")
    parser.add_argument("--out", default="out/demo.mp4", help="the video (default: out/demo.mp4)")
    parser.add_argument("--sheet", help="also a contact sheet, a PNG (default: out/demo.png when --out is not given)")
    parser.add_argument(
        "--face",
        help="where the voice may act: y1,y2,x1,x2 in pixels of the image, a .npy box, none (everywhere), detect, "
        "largest, or the number of a face from the left (default: as the config says)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--resume", action="store_true", help="go on with a render that was interrupted")
    parser.add_argument("--manifest", help="many videos: a .jsonl or .csv file, a row a video")
    return parser


def main(arguments: list[str]) -> int:
    options, cfg = command_line.parse(make_parser(), arguments)
    if options.manifest:
        rows = manifest.read_rows(options.manifest, manifest.column_kinds(cfg.get("sampling", {})))
        manifest.check_alone(arguments)
    else:
        if options.sheet is None and options.out == "out/demo.mp4":
            options.sheet = "out/demo.png"
        row = {name: value for name in manifest.OPTIONS if (value := getattr(options, name)) is not None}
        job = manifest.checked_job(row)
        manifest.check_outputs(job, taken={})

    # From here on JAX is imported, which takes seconds. What is still unchecked is what the files hold, the prompt and
    # the config's values; that is done before any weights are read.
    from emv3_jax import jobs, weight_files

    command_line.setup_compile_cache()
    preset = jobs.preset_of(cfg)
    renderer = jobs.Renderer(cfg, preset, weight_files.load_tokenizer(preset, cfg.weights or None))
    if options.manifest:
        return jobs.render_all(renderer, rows, options.resume)
    jobs.check_resume(pathlib.Path(job.out), options.resume)
    ready, sampling = renderer.read(job)
    renderer.render(job, ready, sampling)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
