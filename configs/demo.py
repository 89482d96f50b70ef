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
            "mode": "default",  # or released
            "dtype": "",  # of the transformer's matmuls; empty: bfloat16 on accelerators, float32 on a CPU
            "riflex": 0,  # RIFLEx: number of the temporal frequency that is slowed down, from 1; 0: none
            "low_memory": False,  # one model at a time in memory
            # several devices: how many ways windows of a long video, guidance branches (1 or all of them) and tokens
            # are divided; context 0 takes all the others
            "mesh": {"data": 1, "branch": 1, "context": 0},
            # what to animate where the command line does not say
            "puppet": 7,  # number of a held-out puppet, which says the sentence that ships with the package
            "prompt": "A puppet nods and smiles, the camera is still.",
            "face": "none",  # where the voice acts, where --face does not say: everywhere
            "frames": 0,  # 4k + 1; 0: as long as the sound
            "fps": 0.0,  # lipsync: frames a second of what is written; 0: those of the given video
            "match_colours": False,  # not for lipsync: move the colours of every frame to those of the first
            "enlarge": 6,  # the video is so many times larger than the model's pictures
            # how the velocity is followed
            "sampling": {
                "sampler": "flow",  # or unipc, dpmpp
                "steps": 12,
                "shift": 3.0,
                "text_scale": 1.0,  # 1: the text guides nothing, and negative prompts are not used
                "audio_scale": 2.0,
                "text_dynamic": False,  # falls to half of the scale on the way
                "audio_dynamic": False,
                "cfg_skip_ratio": 0.0,
                "negative_prompt": "",
                "negative_motion": "",  # PNG: added in the early phase
                "negative_detail": "",  # and in the late one
                "negative_low": 1000 / 3,  # t (1000 is pure noise) below which it is late alone
                "negative_high": 2000 / 3,  # and above which it is early alone; in between the two are mixed
                "neg_scale": 1.0,  # factor of the negative embedding in the first steps, up to neg_steps
                "neg_steps": 0,
                "neg_growth": "",  # steady, or cumulative: once more at every such step, and kept; empty: as the mode
                "cache_threshold": 0.0,  # TeaCache; 0 is off
                "cache_start": 5,
                "long_video": "",  # cfg, chained, released or none; empty: cfg, in released mode chained
                "window": 0,  # video frames; 0: the longest clip of the preset, 125
                "overlap": 8,  # latent frames
                "noise": "",  # in long videos: fresh, repeated or shuffled; empty: repeated in cfg, else fresh
                "windows_together": 0,  # windows in one batch; 0: as many as the device has memory for
                "branches_together": True,
            },
        }
    )
