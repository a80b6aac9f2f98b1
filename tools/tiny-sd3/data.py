"""Batches of scenes from worker processes."""

import torch

import networks
import scenes


class Scenes(torch.utils.data.IterableDataset):
    """Endless batches: the rows for `scenes.compose` and the tokens of the captions, one caption in ten left empty."""

    def __init__(self, subjects, tokenizers, recipe, batch, seed):
        self.subjects, self.tokenizers, self.recipe, self.size, self.seed = subjects, tokenizers, recipe, batch, seed

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        torch.set_num_threads(1)
        sampler = scenes.Sampler(self.subjects, self.seed * 1000 + (worker.id if worker else 0), self.recipe.plain)
        tokens = networks.Tokens(self.tokenizers, self.recipe)
        while True:
            rows, captions = sampler.batch(self.size)
            captions = ["" if sampler.random.random() < 0.1 else caption for caption in captions]
            yield rows, *(numbers.to(torch.int16) for numbers in tokens(captions))


def batches(subjects, tokenizers, recipe, batch, seed, workers, pin):
    dataset = Scenes(subjects, tokenizers, recipe, batch, seed)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=pin, prefetch_factor=4 if workers else None)
    return iter(loader)
