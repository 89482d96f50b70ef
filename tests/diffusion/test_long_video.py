"""Windows over a long latent, with a fake model whose answer can be worked out."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emv3_jax.diffusion import long_video, solvers
from emv3_jax.diffusion.long_video import follow, plan, released_plan
from emv3_jax.diffusion.sampler import sample
from emv3_jax.diffusion.store import Store, claim
from emv3_jax.errors import UserError

SHAPE = (2, 3, 4)


def test_windows_are_of_one_length_and_the_last_ends_with_the_video():
    assert plan(11, 5, 2) == long_video.Windows((0, 3, 6), (5, 8, 11))
    assert plan(10, 5, 2) == long_video.Windows((0, 3, 5), (5, 8, 10))
    assert plan(5, 5, 2) == plan(5, 32, 8) == long_video.Windows((0,), (5,))
    assert plan(10, 5, 0) == long_video.Windows((0, 5), (5, 10))
    assert released_plan(10, 5, 2) == long_video.Windows((0, 3, 6), (5, 8, 10))
    assert released_plan(11, 5, 2) == plan(11, 5, 2)
    with pytest.raises(UserError, match="windows of 5 latent frames cannot overlap by 5"):
        plan(9, 5, 5)


@pytest.mark.parametrize("blend", [long_video.long_video_cfg, long_video.released_blend])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("windows", [plan(11, 5, 2), plan(10, 5, 2), plan(23, 8, 5), released_plan(12, 7, 3)])
def test_weights_of_a_frame_add_up_to_one(windows, blend, step):
    total = np.zeros(windows.total)
    for start, end, row in zip(windows.starts, windows.ends, blend(windows, step), strict=True):
        assert (row >= 0).all()
        total[start:end] += row
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_the_later_window_counts_f_over_n():
    """Paper eq. 4, frames 3, 4 and 5 of windows [0, 6) and [3, 9): f = 0, 1, 2 of N = 2."""
    for blend in (long_video.long_video_cfg, long_video.released_blend):
        first, second = blend(plan(9, 6, 3), 1)
        np.testing.assert_allclose(first, [1, 1, 1, 1, 0.5, 0])
        np.testing.assert_allclose(second, [0, 0.5, 1, 1, 1, 1])
    assert long_video.long_video_cfg(plan(9, 6, 3), 0)[1].tolist() == [0, 0.5, 1, 1, 1, 1]
    assert long_video.released_blend(plan(9, 6, 3), 0)[1].tolist() == [1, 1, 1, 1, 1, 1]


def test_noises_of_the_first_window_come_again():
    """Windows [0, 5), [3, 8), [6, 11), [7, 12): three noises and what becomes of them."""
    windows, frames = plan(12, 5, 2), np.arange(12)
    assert windows.stride == 3 and plan(4, 5, 2).stride == 4
    numbers = {name: choose(frames, windows.stride, 0) for name, choose in long_video.NOISES.items()}
    assert numbers["fresh"].tolist() == list(range(12))
    assert numbers["repeated"].tolist() == [0, 1, 2] * 4
    turns = numbers["shuffled"].reshape(4, 3)
    assert turns[0].tolist() == [0, 1, 2] and all(sorted(turn) == [0, 1, 2] for turn in turns.tolist())


def test_shuffled_noise_is_of_the_seed_and_the_frame_alone():
    """Frames are asked for some at a time, and again when a render goes on."""
    whole = long_video.shuffled_noise(np.arange(240), 24, 5)
    np.testing.assert_array_equal(long_video.shuffled_noise(np.arange(70, 90), 24, 5), whole[70:90])
    assert (whole[24:48] != whole[48:72]).any() and (whole != long_video.shuffled_noise(np.arange(240), 24, 6)).any()
    assert len(long_video.shuffled_noise(np.arange(3), 24, -1)) == 3


@pytest.mark.parametrize("choose", long_video.NOISES.values())
def test_one_window_has_noises_of_its_own_in_order(choose):
    np.testing.assert_array_equal(choose(np.arange(7), plan(7, 9, 2).stride, 3), np.arange(7))


def field(x, t, i):
    """Bends every number by itself, so that windows do not matter."""
    return jnp.sin(1.7 * x + t / 300) + 0.3 * x


def predictor(grid, calls=None, fail_at=None):
    def predict(members, x, i, memory):
        if calls is not None:
            calls.append((i, members))
            if fail_at is not None and len(calls) == fail_at:
                raise KeyboardInterrupt
        return field(jnp.asarray(x), grid.timesteps[i], i), None

    return predict


def new_store(folder, noise, solver):
    state = solver.init(jnp.zeros((1, *SHAPE)))
    start = lambda a, b: (noise[a:b], solver.init(noise[a:b]))  # noqa: E731
    return Store(folder, SHAPE, state, start, len(noise))


@pytest.mark.parametrize("name", solvers.SAMPLERS)
@pytest.mark.parametrize("group", [1, 3])
def test_windows_give_what_the_whole_gives(tmp_path, name, group):
    """A field that acts on every frame alone must not notice the windows, whatever the solver remembers."""
    sampler = solvers.SAMPLERS[name]
    grid = sampler.grid(6, 5.0)
    solver = sampler.solver(grid)
    noise = np.random.default_rng(0).standard_normal((40, *SHAPE)).astype(np.float32)
    store = new_store(tmp_path / "render", noise, solver)
    follow(predictor(grid), solver, grid, plan(40, 9, 4), store, group=group)
    whole = sample(lambda x, t, i: field(x, t[0], i), solver, grid, noise[None])
    np.testing.assert_allclose(store.read_x(0, 40), whole[0], atol=2e-5)


def test_overlaps_are_blended_by_their_weights(tmp_path):
    """Each window says its own number: one Euler step of v = blend of the numbers."""
    grid = solvers.SAMPLERS["flow"].grid(1, 5.0)
    solver = solvers.euler(grid)
    windows = plan(9, 6, 3)
    store = new_store(tmp_path / "render", np.zeros((9, *SHAPE), np.float32), solver)
    follow(lambda members, x, i, memory: (np.full_like(x, 10.0 * members[0]), None), solver, grid, windows, store)
    got = store.read_x(0, 9)[:, 0, 0, 0]
    np.testing.assert_allclose(got, -np.array([0, 0, 0, 0, 5, 10, 10, 10, 10]), atol=1e-5)


@pytest.mark.parametrize("fail_at", [1, 4, 5, 11])
def test_an_interrupted_render_goes_on_bit_for_bit(tmp_path, fail_at):
    sampler = solvers.SAMPLERS["unipc"]
    grid = sampler.grid(5, 5.0)
    solver, windows = sampler.solver(grid), plan(12, 5, 2)
    noise = np.random.default_rng(0).standard_normal((12, *SHAPE)).astype(np.float32)
    whole = new_store(tmp_path / "whole", noise, solver)
    follow(predictor(grid), solver, grid, windows, whole)
    calls: list = []
    with pytest.raises(KeyboardInterrupt):
        follow(predictor(grid, calls, fail_at), solver, grid, windows, new_store(tmp_path / "cut", noise, solver))
    again: list = []
    steps: list = []
    store = new_store(tmp_path / "cut", noise, solver)
    assert store.done == (fail_at - 1) // len(windows.starts)
    follow(predictor(grid, again), solver, grid, windows, store, on_step=lambda i, n: steps.append((i, n)))
    assert steps == [(i + 1, 5) for i in range((fail_at - 1) // len(windows.starts), 5)]
    np.testing.assert_array_equal(store.read_x(0, 12), whole.read_x(0, 12))


def test_memory_is_kept_between_steps_and_runs_and_follows_its_window(tmp_path):
    """Windows [0, 5), [3, 8), [6, 11): two together in the first steps, after an interruption one or all three."""
    grid = solvers.SAMPLERS["flow"].grid(3, 5.0)
    solver = solvers.euler(grid)
    for later in (1, 3):
        seen = []

        def predict(members, x, i, memory):
            if i == 2 and len(members) == 2:
                raise KeyboardInterrupt
            seen.append((members, None if memory is None else memory.tolist()))  # noqa: B023
            return np.zeros_like(x), np.array([[10.0 * i + k for k in members], [0.5] * len(members)], np.float32)

        folder, noise = tmp_path / f"render_{later}", np.zeros((11, *SHAPE), np.float32)
        with pytest.raises(KeyboardInterrupt):
            follow(predict, solver, grid, plan(11, 5, 2), new_store(folder, noise, solver), group=2)
        assert seen[:2] == [((0, 1), None), ((2, 2), None)]
        assert seen[2:] == [((0, 1), [[0, 1], [0.5, 0.5]]), ((2, 2), [[2, 2], [0.5, 0.5]])]
        del seen[:]
        follow(predict, solver, grid, plan(11, 5, 2), new_store(folder, noise, solver), group=later)
        assert [k for _, memory in seen for k in memory[0]] == [10, 11, 12]


def test_a_memory_that_did_not_change_is_not_written(tmp_path, monkeypatch):
    grid = solvers.SAMPLERS["flow"].grid(4, 5.0)
    solver, written, seen = solvers.euler(grid), [], []
    write = Store.write_memory
    monkeypatch.setattr(Store, "write_memory", lambda *args: (written.append(args[1]), write(*args)))

    def predict(members, x, i, memory):
        seen.append(None if memory is None else float(memory[0, 0]))
        return np.zeros_like(x), np.full((1, 1), i, np.float32) if i in (0, 2) else None

    store = new_store(tmp_path / "render", np.zeros((5, *SHAPE), np.float32), solver)
    follow(predict, solver, grid, plan(5, 5, 2), store)
    assert seen == [None, 0, 0, 2] and written == [0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_stop_at_their_step(tmp_path, bad):
    grid = solvers.SAMPLERS["flow"].grid(3, 5.0)
    solver = solvers.euler(grid)
    store = new_store(tmp_path / "render", np.zeros((11, *SHAPE), np.float32), solver)

    def predict(members, x, i, memory):
        v = np.zeros_like(x)
        v[-1, -1, 0, 0, 0] = bad if i == 1 and members == (2,) else 0.0
        return v, None

    with pytest.raises(
        UserError, match="step 2 of 3 gave numbers that are not finite: start again with smaller .* float32"
    ):
        follow(predict, solver, grid, plan(11, 5, 2), store)
    assert store.done == 1


def test_a_folder_of_another_render_is_refused(tmp_path):
    folder, settings = tmp_path / "render", {"seed": 1, "prompt": "a", "sampling": {"steps": 3, "shift": 5.0}}
    claim(folder, settings)
    claim(folder, settings)
    with pytest.raises(UserError, match="render with another prompt, sampling shift, seed: remove it, or ask for"):
        claim(folder, {"seed": 2, "prompt": "b", "sampling": {"steps": 3, "shift": 4.0}})
    (folder / "settings.json").write_text("{")
    with pytest.raises(UserError, match="settings.json is damaged"):
        claim(folder, settings)
    (folder / "settings.json").rename(folder / "given.f32")
    with pytest.raises(UserError, match="holds no settings.json, so whose it is cannot be told: remove it"):
        claim(folder, settings)


def test_settings_that_cannot_be_written_leave_no_folder(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(UserError, match="settings.json could not be written: no space left on device"):
        claim(tmp_path / "render", {})
    assert not (tmp_path / "render").exists()


def test_damaged_progress_is_told(tmp_path):
    grid = solvers.SAMPLERS["flow"].grid(3, 5.0)
    solver, noise = solvers.euler(grid), np.zeros((4, *SHAPE), np.float32)
    new_store(tmp_path / "render", noise, solver)
    (tmp_path / "render" / "progress.json").write_text("{")
    with pytest.raises(UserError, match="progress.json is damaged"):
        new_store(tmp_path / "render", noise, solver)


def test_a_store_that_lost_frames_says_so(tmp_path):
    grid = solvers.SAMPLERS["flow"].grid(3, 5.0)
    store = new_store(tmp_path / "render", np.zeros((4, *SHAPE), np.float32), solvers.euler(grid))
    (tmp_path / "render" / "a_0.f32").write_bytes(b"1234")
    with pytest.raises(UserError, match="is cut off"):
        store.read_x(0, 4)


def test_memory_does_not_grow_with_length(tmp_path):
    """What a step holds at once: arrays of a window, whatever the video's length."""
    grid = solvers.SAMPLERS["flow"].grid(1, 5.0)
    solver, largest = solvers.euler(grid), []

    def predict(members, x, i, memory):
        largest.append(sum(a.nbytes for a in jax.live_arrays()))
        return np.zeros_like(x), None

    for length in (20, 200):
        store = new_store(tmp_path / str(length), np.zeros((length, *SHAPE), np.float32), solver)
        follow(predict, solver, grid, plan(length, 9, 4), store)
    assert max(largest[-10:]) <= max(largest[:3]) + 50_000
