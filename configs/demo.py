"""The demo: a puppet that says a sentence, or your own picture, sound and prompt.

python sample.py --config configs/demo.py

makes out/demo.mp4 and out/demo.png from a held-out puppet and the sentence that ships with the package.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "preset": "demo",
            "weights": "",  # a folder that train.py wrote; empty: the shipped weights
            # what to animate where the command line does not say
            "puppet": 7,  # number of a held-out puppet
            "prompt": "A puppet nods and smiles, the camera is still.",
            "frames": 0,  # 4k + 1; 0: as long as the sound
            "enlarge": 6,  # the video is so many times larger than the model's pictures
            # how the velocity is followed
            "sampling": {
                "sampler": "flow",  # or unipc, dpmpp
                "steps": 12,
                "shift": 3.0,
                "text_scale": 1.0,
                "audio_scale": 2.0,
                "text_dynamic": False,  # falls to half of the scale on the way
                "audio_dynamic": False,
                "negative_prompt": "",
            },
        }
    )
