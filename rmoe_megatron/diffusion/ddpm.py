"""DDPM as DiT trains it: linear betas, predicted noise, and a learned variance (Nichol and Dhariwal, 2021)."""

import math

import torch
from torch import Tensor

from rmoe_megatron.config.model import DiffusionConfig
from rmoe_megatron.counter_rng import Purpose, derive, normal, uniform
from rmoe_megatron.diffusion.objective import NoisedLatents, mean_per_sample

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 1.0e-4, 2.0e-2


class DDPM:
    """Noisy latents ``sqrt(a_t) x + sqrt(1 - a_t) noise`` with a_t the cumulative product of ``1 - beta``.

    The loss is the noise's mean squared error; a model with twice the channels also learns the variance of the
    reverse step, whose variational bound in bits per dimension is added. The bound's mean takes no gradient.

    Args:
        device: where the latents will be; what depends on the timestep alone is kept there.
    """

    def __init__(self, config: DiffusionConfig, device: torch.device) -> None:
        self.min_snr_gamma = config.min_snr_gamma
        betas = torch.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=torch.float64)
        alphas_cumprod = (1 - betas).cumprod(0)
        previous = torch.cat((torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]))
        # q(x_{t-1} | x_t, x_0), equation 7 of Ho et al., 2020.
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        posterior_variance[0] = posterior_variance[1]  # zero at the last step; its logarithm is needed

        def table(values: Tensor) -> Tensor:
            """Worked out in float64 on the CPU, where every device gets the same from; float32 [1000]."""
            return values.float().to(device)

        self.signal = table(alphas_cumprod.sqrt())
        self.noise_scale = table((1 - alphas_cumprod).sqrt())
        self.snr = table(alphas_cumprod / (1 - alphas_cumprod))
        self.sample_from_noisy = table(alphas_cumprod.rsqrt())
        self.sample_from_noise = table((1 / alphas_cumprod - 1).sqrt())
        self.log_betas = table(betas.log())
        self.posterior_log_variance = table(posterior_variance.log())
        self.posterior_from_sample = table(betas * previous.sqrt() / (1 - alphas_cumprod))
        self.posterior_from_noisy = table((1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod))

    def drawn_time(self, rng_keys: Tensor) -> Tensor:
        """Return the timestep as a share of all, float32 [B] in [0, 1), for samples' keys int64 [B]."""
        return uniform(derive(rng_keys, Purpose.timestep), 1).squeeze(-1)

    def add_noise(self, latents: Tensor, rng_keys: Tensor, time: Tensor | None = None) -> NoisedLatents:
        """Draw timesteps uniformly and noise for latents float32 [B, C, H, W]; rng_keys are int64 [B].

        A time that is given is the timestep's share of all, rounded down.
        """
        share = self.drawn_time(rng_keys) if time is None else time
        timestep = (share * NUM_TIMESTEPS).long()
        noise = normal(derive(rng_keys, Purpose.noise), math.prod(latents.shape[1:])).view_as(latents)
        noisy = self._at(self.signal, timestep) * latents + self._at(self.noise_scale, timestep) * noise
        return NoisedLatents(noisy, timestep.float(), noise, latents)

    def loss(self, output: Tensor, noised: NoisedLatents) -> Tensor:
        """Return the mean loss for the model's output [B, C or 2 C, H, W], a float32 scalar."""
        timestep = noised.timestep.long()
        noise, *variance = output.split(noised.target.shape[1], dim=1)
        loss = mean_per_sample((noise - noised.target) ** 2)
        if self.min_snr_gamma is not None:
            snr = self.snr[timestep]
            loss = loss * snr.clamp_max(self.min_snr_gamma) / snr
        if variance:
            loss = loss + self.variational_bound(noise.detach(), variance[0], noised)
        return loss.mean()

    def variational_bound(self, noise: Tensor, variance: Tensor, noised: NoisedLatents) -> Tensor:
        """Return the bound's term of each sample's timestep in bits per dimension, float32 [B].

        Args:
            noise: predicted noise [B, C, H, W].
            variance: in [-1, 1] where the log variance goes from the posterior's to beta's; [B, C, H, W].
        """
        timestep = noised.timestep.long()
        fraction = (variance + 1) / 2
        lowest = self._at(self.posterior_log_variance, timestep)
        log_variance = fraction * self._at(self.log_betas, timestep) + (1 - fraction) * lowest
        sample = (
            self._at(self.sample_from_noisy, timestep) * noised.noisy_latents
            - self._at(self.sample_from_noise, timestep) * noise
        )
        mean = self._posterior_mean(sample, noised.noisy_latents, timestep)
        true_mean = self._posterior_mean(noised.latents, noised.noisy_latents, timestep)
        divergence = gaussian_divergence(true_mean, lowest, mean, log_variance)
        likelihood = discretised_log_likelihood(noised.latents, mean, 0.5 * log_variance)
        bound = torch.where((timestep == 0).view(-1, 1, 1, 1), -likelihood, divergence)
        return mean_per_sample(bound) / math.log(2)

    def _posterior_mean(self, sample: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
        from_sample = self._at(self.posterior_from_sample, timestep)
        return from_sample * sample + self._at(self.posterior_from_noisy, timestep) * noisy

    @staticmethod
    def _at(values: Tensor, timestep: Tensor) -> Tensor:
        """Pick a value per timestep as float32 [B, 1, 1, 1]."""
        return values[timestep].view(-1, 1, 1, 1)


def gaussian_divergence(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of normal distributions 1 from 2, elementwise in nats."""
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - difference - 1 + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretised_log_likelihood(value: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log probability of the 1/255-wide bin around ``value`` in [-1, 1] under a normal distribution.

    The outermost bins reach to infinity (Ho et al., 2020, equation 13). As in DiT the normal's distribution function
    is the tanh approximation.
    """
    half_bin = 1 / 255
    upper = _normal_cdf((value - mean + half_bin) * (-log_scale).exp())
    lower = _normal_cdf((value - mean - half_bin) * (-log_scale).exp())
    upper = torch.where(value > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(value < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp_min(1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
