"""Noise from the world: recordings, magnetic resonance, sensors and analog devices, beside formulas written again."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_noise import noise, schedules

HUM = torch.arange(1.0, 8.0)
LONG = torch.randn(500, generator=torch.Generator(torch.get_default_device()).manual_seed(3))


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


# --- recordings


def test_a_segment_is_looped_or_cut_from_a_random_place(generator):
    x = 1 + torch.rand(3000, 20, dtype=torch.float64, generator=generator)
    error = noise.Recorded([HUM, LONG])(x, schedules.from_snr_db(12.0), generator=generator) - x
    segments = [torch.stack([HUM.roll(-k).repeat(3)[:20] for k in range(7)]), LONG.unfold(0, 20, 1)]
    starts = torch.cat(segments).double()
    starts /= starts.norm(dim=1, keepdim=True)
    likeness = error / error.norm(dim=1, keepdim=True) @ starts.T
    torch.testing.assert_close(likeness.amax(1), torch.ones(3000, dtype=torch.float64), rtol=1e-6, atol=0)
    counts = likeness.argmax(1).bincount(minlength=len(starts))
    assert abs(counts[:7].sum().item() - 1500) <= 5 * math.sqrt(750)  # five standard errors, as below
    for times, n in ((counts[:7], 7), (counts[7:], 481)):
        assert abs((counts.sum() / 2 / n - times).square().sum().item() / (1500 / n) - n) <= 5 * math.sqrt(2 * n) + 5


def test_the_signal_to_noise_ratio_is_that_of_the_usual_formula(generator):
    x, mask = torch.randn(4, 2, 100, dtype=torch.float64, generator=generator), torch.ones(4, 2, 100, dtype=torch.bool)
    mask[1, :, 60:] = mask[2] = False
    y = noise.Recorded(LONG[None])(x, schedules.from_snr_db(7.0), generator=generator, mask=mask)
    for i in (0, 1, 3):
        signal, error = x[i][mask[i]], (y - x)[i][mask[i]]
        assert 10 * math.log10(signal.square().sum() / error.square().sum()) == pytest.approx(7.0, abs=1e-9)
    assert torch.equal(y[2], x[2])


@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1.0, 1e15, 1e25])
@pytest.mark.parametrize("member", [noise.SNR(), noise.SNR(center=True), noise.Recorded(LONG[None])], ids=repr)
def test_the_ratio_is_exact_for_data_of_any_scale(member, scale, generator):
    x = scale * torch.randn(4, 100, generator=generator)
    x -= x.mean(1, keepdim=True)
    y = member(x, 0.1, generator=generator)
    torch.testing.assert_close((y - x).double().norm(dim=1) / x.double().norm(dim=1), torch.full((4,), 0.1).double())


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_the_scale_of_a_recording_does_not_count(scale):
    x = torch.rand(4, 100)
    y = noise.Recorded(scale * LONG[None])(x, 0.1, generator=stream())
    torch.testing.assert_close(y, noise.Recorded(LONG[None])(x, 0.1, generator=stream()))


def test_a_recording_without_channels_is_the_same_in_all_and_others_keep_theirs(generator):
    x = torch.rand(5, 2, 30, generator=generator)
    stereo = torch.stack([LONG, -2 * LONG])
    for bank, factor in ((LONG[None], 1.0), (stereo[None], -2.0), ([stereo], -2.0)):
        error = noise.Recorded(bank)(x, 0.5, generator=stream()) - x
        torch.testing.assert_close(error[:, 1], factor * error[:, 0], rtol=1e-4, atol=1e-5)
        turned = noise.Recorded(bank, dim=-2)(x.transpose(1, 2).contiguous(), 0.5, generator=stream())
        torch.testing.assert_close(turned, (x + error).transpose(1, 2), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"recordings with channels of shape \(2,\) do not fit samples of shape \(3, 30\)"):
        noise.Recorded([stereo])(torch.rand(5, 3, 30), 0.5, generator=stream())


@pytest.mark.parametrize("loudness", [1.0, 1e6])
def test_silence_adds_nothing(loudness):
    x = loudness * torch.rand(3, 10)
    assert torch.equal(noise.Recorded(torch.zeros(2, 40))(x, 0.5, generator=stream()), x)


def test_the_default_dtype_does_not_change_the_segments():
    x, recorded = torch.ones(64, 5), noise.Recorded([HUM, LONG])
    expected = recorded(x, 0.5, generator=stream())
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # has 256 numbers in [0.5, 1): too few for the places of a recording
        assert torch.equal(recorded(x, 0.5, generator=stream()), expected)
    finally:
        torch.set_default_dtype(before)


def test_recordings_are_compared_by_their_numbers_and_shown_in_short():
    given = LONG.clone()
    one, two = noise.Recorded([given, HUM]), noise.Recorded([LONG.tolist(), HUM.double().cpu().numpy()])
    assert noise.Recorded(HUM[None]) == noise.Recorded(HUM[None].cpu().numpy())
    assert one == two
    assert hash(one) == hash(two)
    assert one != noise.Recorded([HUM, given])
    assert len(repr(one)) < 100
    drawn = one(torch.ones(2, 50), 0.5, generator=stream())
    given.zero_()
    for other in (one, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other == two
        assert torch.equal(other(torch.ones(2, 50), 0.5, generator=stream()), drawn)


@pytest.mark.parametrize(
    ("bank", "message"),
    [
        ([], "bank must be a tensor, a list of tensors or a folder"),
        (0.3, r"type noise.Recorded\('noises', sample_rate=16000\)"),
        (["hum.wav"], r"got \['hum.wav'\]; type noise.Recorded\('noises', sample_rate=16000\)"),
        (torch.zeros(5), r"of shape \(T,\), .*; for a single recording type noise.Recorded\(\[recording\]\)"),
        (torch.tensor(0.5), r"got tensor\(0.5000\); type noise.Recorded\('noises', sample_rate=16000\)"),
        (torch.ones(2, 5, dtype=torch.complex64), "must be real numbers"),
        ([HUM, torch.tensor([1.0, math.nan])], "must be finite numbers"),
        ([HUM, torch.ones(2, 7)], r"got shape \(2, 7\) beside \(7,\)"),
        ([HUM, torch.ones(0)], r"got shape \(0,\)"),
    ],
    ids=repr,
)
def test_a_bank_that_holds_no_recordings_is_refused(bank, message):
    with pytest.raises((TypeError, ValueError), match=message):
        noise.Recorded(bank)


def test_a_sample_rate_is_checked_and_named():
    with pytest.raises(TypeError, match="sample_rate must be a whole number, got 'high'"):
        noise.Recorded([HUM], sample_rate="high")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"type noise.Recorded\('street', sample_rate=8000\)"):
        noise.Recorded("street", 8000)  # type: ignore[call-arg,misc]
    with pytest.raises(TypeError, match=r"type noise.Recorded\('street', sample_rate=8000\)"):
        noise.Recorded("street", sr=8000)  # type: ignore[call-arg]


def test_a_call_without_a_bank_says_what_to_type():
    with pytest.raises(TypeError, match=r"type noise.Recorded\('recordings', sample_rate=16000\)"):
        noise.Recorded()  # type: ignore[call-arg]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    soundfile = pytest.importorskip("soundfile")
    (tmp_path / "street").mkdir()
    soundfile.write(tmp_path / "b.wav", LONG.clamp(-1, 1).numpy(), 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "street" / "c.wav", (HUM / 8).numpy(), 8000, subtype="FLOAT")
    for text in ("a.txt", "a.raw"):
        (tmp_path / text).write_text("not a recording")
    return tmp_path


def test_a_folder_of_audio_files_is_a_bank(folder):
    x = torch.rand(6, 40, generator=stream(1))
    recorded = noise.Recorded(folder, sample_rate=8000)
    expected = noise.Recorded([LONG.clamp(-1, 1), HUM / 8])(x, 0.5, generator=stream())
    for each in (recorded, pickle.loads(pickle.dumps(recorded))):
        assert torch.equal(each(x, 0.5, generator=stream()), expected)
    assert repr(recorded) == f"Recorded(bank={str(folder)!r}, sample_rate=8000, dim=-1)"


def test_a_folder_stays_where_it_was_named(folder, monkeypatch):
    x = torch.rand(6, 40, generator=stream(1))
    expected = noise.Recorded(folder, sample_rate=8000)(x, 0.5, generator=stream())
    monkeypatch.chdir(folder.parent)
    recorded = noise.Recorded(folder.name, sample_rate=8000)
    monkeypatch.chdir(folder / "street")
    for each in (recorded, copy.deepcopy(recorded), pickle.loads(pickle.dumps(recorded))):
        assert torch.equal(each(x, 0.5, generator=stream()), expected)


@pytest.mark.parametrize(("name", "kind"), [("d.aif", "AIFF"), ("d.oga", "OGG"), ("d.flac", "FLAC")])
def test_every_file_of_a_folder_is_a_recording(folder, name, kind):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(folder / name, LONG.clamp(-1, 1).numpy(), 8000, format=kind)
    decoded, x = soundfile.read(folder / name, dtype="float32")[0], torch.rand(60, 40, generator=stream(1))
    expected = noise.Recorded([LONG.clamp(-1, 1), decoded, HUM / 8])(x, 0.5, generator=stream())
    assert torch.equal(noise.Recorded(folder, sample_rate=8000)(x, 0.5, generator=stream()), expected)


def test_a_folder_that_cannot_be_used_is_refused(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"got None; type noise.Recorded\(.*, sample_rate=16000\)"):
        noise.Recorded(folder)
    with pytest.raises(ValueError, match="without any"):
        noise.Recorded(folder / "nowhere", sample_rate=8000)
    with pytest.raises(ValueError, match=r"b\.wav must have 16000 samples per second, got 8000; type ffmpeg -i b\.wav"):
        noise.Recorded(folder, sample_rate=16_000)(torch.rand(2, 9), 0.5, generator=stream())
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match="type pip install soundfile"):
        noise.Recorded(folder, sample_rate=8000)


# --- images and sensors


def test_a_magnitude_has_a_gradient_at_every_level_and_no_negative_data(generator):
    x = torch.tensor([[0.0, 0.5], [0.0, 0.5]], requires_grad=True)
    y = noise.Rician()(x, torch.tensor([0.0, 0.1]), generator=generator)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[0], torch.ones(2))
    assert x.grad.isfinite().all()
    assert (y > 0)[1].all()
    with pytest.raises(ValueError, match=r"Rician needs data that are not negative, got a minimum of -0.1"):
        noise.Rician()(torch.tensor([[0.3, -0.1]]), 0.1, generator=generator)


def test_a_quantized_sample_is_on_one_grid_and_within_half_a_step(generator):
    x = torch.rand(200, 50, dtype=torch.float64, generator=generator).requires_grad_()
    y = noise.Quantization()(x, 0.25, generator=generator)
    steps = (y - y[:, :1]) / 0.25
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-12)
    assert ((y - x).abs() <= 0.125 + 1e-12).all()
    assert ((y - x).abs() > 0.12).any()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [1e-178, 1e-40])
def test_steps_that_vanish_beside_the_data_change_nothing(level, generator):
    x = 100 * torch.rand(2, 5)
    assert torch.equal(noise.Quantization()(x, level, generator=generator), x)
    assert torch.equal(noise.Quantization()(x, torch.tensor([level, 0.0]), generator=generator), x)


def test_jitter_reads_between_the_samples(generator):
    x = torch.randn(50, 3, 40, dtype=torch.float64, generator=generator)
    y = noise.Jitter()(x, 1.5, generator=stream())
    times = np.arange(40) + 1.5 * torch.empty(50, 40, dtype=torch.float64).normal_(generator=stream()).numpy()
    expected = [
        [np.interp(time, np.arange(40), channel) for channel in rows] for time, rows in zip(times, x.numpy(), strict=True)
    ]
    torch.testing.assert_close(y, torch.tensor(np.array(expected)), rtol=0, atol=1e-12)
    turned = noise.Jitter(dim=-2)(x.transpose(1, 2).contiguous(), 1.5, generator=stream())
    assert torch.equal(turned.transpose(1, 2), y)


def test_jitter_passes_over_what_is_invalid():
    x = torch.randn(50, 3, 40, dtype=torch.float64, generator=stream(1))
    mask = torch.rand(x.shape, generator=stream(2)) < 0.6
    y = noise.Jitter()(x, 1.5, generator=stream(), mask=mask)
    delays = 1.5 * torch.empty(50, 40, dtype=torch.float64).normal_(generator=stream()).numpy()
    for i, k in ((0, 0), (7, 1), (49, 2)):
        valid = mask[i, k].numpy()
        series = x[i, k].numpy()[valid]
        places = np.arange(len(series))
        expected = np.interp(places + delays[i][valid], places, series)
        np.testing.assert_allclose(y[i, k].numpy()[valid], expected, rtol=0, atol=1e-12)


# --- analog weights


def phase_change_memory(w: np.ndarray, t: float, scale: float, normal) -> np.ndarray:
    """The published model in microsiemens, one pair of devices for each weight, as in Joshi et al. and in the simulator."""
    g_max, t_0, t_read = 25.0, 20.0, 250e-9
    largest = np.abs(w).max(axis=1, keepdims=True)
    found = []
    for sign, (z_program, z_read, z_drift) in ((1, normal[0]), (-1, normal[1])):
        g = np.maximum(sign * w / largest, 0) * g_max
        sigma = np.maximum(-1.1731 * (g / g_max) ** 2 + 1.9650 * (g / g_max) + 0.26348, 0)
        g_prog = np.maximum(g + scale * sigma * z_program, 0)
        log_g = np.log(np.maximum(g / g_max, 1e-7))
        mu_nu = np.minimum(np.maximum(-0.0155 * log_g + 0.0244, 0.049), 0.1)
        sigma_nu = np.minimum(np.maximum(-0.0125 * log_g - 0.0059, 0.008), 0.045)
        nu = scale * np.abs(mu_nu + sigma_nu * z_drift)
        g_drift = g_prog * ((t + t_0) / t_0) ** -nu
        q = np.minimum(0.0088 / np.maximum((g_prog / g_max) ** 0.65, 1e-3), 0.2)
        sigma_read = g_drift * q * np.sqrt(np.log((t + t_0 + t_read) / (2 * t_read)))
        found.append(np.maximum(g_drift + scale * sigma_read * z_read, 0))
    return (found[0] - found[1]) * largest / g_max


@pytest.mark.parametrize("time", [0.0, 25.0, 86_400.0])
@pytest.mark.parametrize("level", [0.5, 1.0, 2.0])
def test_analog_weights_are_those_of_the_published_model(level, time):
    w = torch.randn(30, 20, dtype=torch.float64, generator=stream(1))
    w[:, 0] = 0
    z = torch.empty(3 if time else 2, 2, 30, 20, dtype=torch.float64).normal_(generator=stream()).numpy()
    normal = [(z[0, k], z[1, k], z[2, k] if time else 0.0) for k in (0, 1)]
    y = noise.AnalogWeights(time=time)(w, level, generator=stream())
    expected = phase_change_memory(w.numpy(), time, level, normal)
    torch.testing.assert_close(y, torch.tensor(expected), rtol=1e-9, atol=1e-12)


def test_a_row_of_zeros_stays_and_negative_times_are_refused(generator):
    assert torch.equal(noise.AnalogWeights()(torch.zeros(2, 5), 1.0, generator=generator), torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"type WeightNoise\(noise.AnalogWeights\(\), 0.5\)"):
        noise.AnalogWeights(0.5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"time must not be negative, got -1.0; type time=0.0"):
        noise.AnalogWeights(time=-1.0)
