"""Latent diffusion as a generative model: on a known distribution its samples have that distribution's moments."""

import torch

from crysldnet.models.dit import DiT
from crysldnet.models.flow import LatentFlow
from crysldnet.models.latent import LatentStatistics, Posterior


def train_flow(draw, steps: int) -> LatentFlow:
    torch.manual_seed(0)
    flow = LatentFlow(denoiser=DiT(latent_dim=2, width=64, layers=2, heads=4), latent_dim=2)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        z, crystal, sizes = draw(256)
        loss = flow(z, z, crystal, sizes, int(sizes.max())).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return flow.eval()


def correlated_gaussian(n_crystals: int):
    """Crystals of 1 to 3 atoms whose latents are N(mean, covariance), independent between atoms."""
    sizes = torch.randint(1, 4, (n_crystals,))
    crystal = torch.repeat_interleave(torch.arange(n_crystals), sizes)
    noise = torch.randn(len(crystal), 2)
    root = torch.tensor([[1.0, 0.0], [0.6, 0.5]])
    return noise @ root.T + torch.tensor([0.5, -1.0]), crystal, sizes


def test_samples_have_the_mean_and_covariance_of_a_known_distribution():
    flow = train_flow(correlated_gaussian, 400)
    torch.manual_seed(1)
    samples = flow.sample(torch.tensor([1, 2, 3] * 700), steps=50)
    assert samples.shape == (4200, 2)
    true = torch.tensor([[1.0, 0.6], [0.6, 0.61]])
    assert torch.allclose(samples.mean(0), torch.tensor([0.5, -1.0]), atol=0.12)
    assert torch.allclose(torch.cov(samples.T), true, atol=0.15)


def test_an_untrained_model_does_not_have_them():
    torch.manual_seed(0)
    flow = LatentFlow(denoiser=DiT(latent_dim=2, width=64, layers=2, heads=4), latent_dim=2).eval()
    samples = flow.sample(torch.tensor([2] * 500), steps=50)
    assert not torch.allclose(samples.mean(0), torch.tensor([0.5, -1.0]), atol=0.12)


def test_the_loss_of_an_uninformed_denoiser_is_the_average_weight():
    torch.manual_seed(0)
    flow = LatentFlow(denoiser=DiT(latent_dim=4, width=16, layers=1, heads=2), latent_dim=4)
    sizes = torch.full((4000,), 3)
    z = torch.randn(12000, 4)
    loss = flow(z, z, torch.repeat_interleave(torch.arange(4000), sizes), sizes, int(sizes.max())).loss
    # E over t in [0.01, 0.99] of 1 / max(1 - t, 0.1)^2 = (1/0.1 - 1/0.99 + 0.09/0.01) / 0.98
    assert abs(float(loss) - (10 - 1 / 0.99 + 9) / 0.98) < 1.0


def test_padding_carries_no_noise_and_no_loss():
    torch.manual_seed(0)
    flow = LatentFlow(denoiser=DiT(latent_dim=2, width=16, layers=1, heads=2), latent_dim=2, center_noise="atoms")
    valid = torch.tensor([[True, True, False], [True, True, True]])
    noise = flow._noise(torch.empty(2, 3, 2), valid)
    assert (noise[0, 2] == 0).all()
    assert noise.sum(1).abs().max() < 1e-5


def test_normalised_latents_have_a_fixed_scale_whatever_the_encoder_does():
    torch.manual_seed(0)
    posterior = Posterior(width=8, latent_dim=4).train()
    features = torch.randn(500, 8)
    small, large = posterior(0.1 * features).mean, posterior(1e3 * features).mean
    assert torch.allclose(small.std(0, correction=0), torch.ones(4), atol=0.1)
    assert torch.allclose(large.std(0, correction=0), torch.ones(4), atol=1e-3)
    free = Posterior(width=8, latent_dim=4, normalize=False)
    assert free(0.1 * features).mean.std() < 0.1


def test_rank_and_spread_tell_the_two_collapses_apart():
    torch.manual_seed(0)
    x = torch.randn(4000, 6)
    for features, spread, rank in (
        (x, 1.0, 6.0),
        (0.01 * x, 0.01, 6.0),
        (x[:, :1] @ torch.ones(1, 6), 1.0, 1.0),
    ):
        statistics = LatentStatistics(6)
        for part in features.split(1000):
            statistics.update(part)
        values = statistics.compute()
        assert abs(float(values["spread"]) / spread - 1) < 0.05
        assert abs(float(values["rank"]) - rank) < 0.1
