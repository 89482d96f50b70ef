"""The released preview model, with the values of its demos (those of the newest demo, where demos differ).

python sample.py --config configs/preview.py --image me.jpg --audio voice.wav --prompt "..." --out talk.mp4

needs converted weights in the folder weights (python -m convert to-jax --from DIR --variant preview --to weights), or
in another one: --config.weights=DIR. --config.mode=released does as the released program does where ours is right
instead. A video takes minutes on an accelerator and many hours on a CPU.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "preset": "preview",
            "weights": "weights",
            "mode": "default",  # or released
            "dtype": "",  # of the transformer's matmuls; empty: bfloat16 on accelerators, float32 on a CPU
            "riflex": 0,  # RIFLEx: number of the temporal frequency that is slowed down, from 1; 0: none
            "low_memory": True,  # one model at a time in memory
            # several devices: how many ways windows of a long video, guidance branches (1 or all of them) and tokens
            # are divided; context 0 takes all the others
            "mesh": {"data": 1, "branch": 1, "context": 0},
            # what to animate where the command line does not say
            "puppet": -1,  # none: picture and sound must be given
            "prompt": "",
            "face": "detect",  # where the voice acts, where --face does not say: on the face that is found
            "frames": 0,  # 4k + 1; 0: as long as the sound
            "fps": 0.0,  # lipsync: frames a second of what is written; 0: those of the given video
            "match_colours": False,  # not for lipsync: move the colours of every frame to those of the first
            "enlarge": 1,
            # how the velocity is followed
            "sampling": {
                "sampler": "flow",  # or unipc, dpmpp
                "steps": 25,  # 5 will do for talking heads; 15 to 25 for bodies
                "shift": 5.0,
                "text_scale": 4.0,  # 3 to 6
                "audio_scale": 2.9,  # 1.8 to 3
                "text_dynamic": True,
                "audio_dynamic": True,
                "cfg_skip_ratio": 0.0,
                "negative_prompt": (
                    "Gesture is bad. Gesture is unclear. Strange and twisted hands. Bad hands. Bad fingers. Unclear "
                    "and blurry hands. 手部快速摆动, 手指频繁抽搐, 夸张手势, 重复机械性动作."
                ),
                "negative_motion": "",  # PNG: added in the early phase
                "negative_detail": "",  # and in the late one
                "negative_low": 1000 / 3,  # t (1000 is pure noise) below which it is late alone
                "negative_high": 2000 / 3,  # and above which it is early alone; in between the two are mixed
                "neg_scale": 1.5,  # factor of the negative embedding in the first steps, up to neg_steps
                "neg_steps": 2,
                "neg_growth": "",  # steady, or cumulative: once more at every such step, and kept; empty: as the mode
                "cache_threshold": 0.0,  # TeaCache: 0.1 is the released value, where it is on; 0 is off
                "cache_start": 5,
                "long_video": "",  # cfg, chained, released or none; empty: cfg, in released mode chained
                "window": 0,  # video frames; 0: the longest clip of the preset, 113
                "overlap": 8,  # latent frames
                "noise": "fresh",  # in long videos: fresh, as released, repeated or shuffled (measured on puppets)
                "windows_together": 0,  # windows in one batch; 0: as many as the device has memory for
                "branches_together": True,
            },
        }
    )
