"""Trains with SAM at every second step in two processes of Lightning; started by test_integrations.py.

    lightning_worker.py OUT

OUT gets the final weights of rank 0. Rank r trains on the batches `batches(r)`."""
import sys

import lightning
import torch
from torch import nn
from torch.nn import functional as F
from sadt_nb.core.lightning import MethodCallback
from sadt_nb.methods.sam import SAM


def batches(rank):
    gen = torch.Generator().manual_seed(rank)
    x = torch.randn(16, 5, generator=gen, dtype=torch.float64)
    y = torch.randint(0, 3, (16,), generator=gen)
    return list(zip(x.split(4), y.split(4)))


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


class Module(lightning.LightningModule):
    def __init__(self, out):
        super().__init__()
        self.net, self.out = network(), out

    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self): return torch.optim.SGD(self.net.parameters(), lr=.1, momentum=.9)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(batches(self.global_rank), batch_size=None)

    def on_train_end(self):
        if self.global_rank == 0: torch.save(self.net.state_dict(), self.out)


def main(out):
    trainer = lightning.Trainer(
        max_epochs=1, accelerator='cpu', strategy='ddp_fork', devices=2, use_distributed_sampler=False,
        precision='64-true', callbacks=[MethodCallback(SAM(.1, interval=2))], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Module(out))


if __name__ == '__main__': main(sys.argv[1])
