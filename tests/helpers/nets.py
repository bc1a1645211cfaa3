"""Small nets with random weights and BatchNorms: NETS maps a name to a function that returns (net, example inputs)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import BatchNorm2d, LayerNorm, Linear

from tests.helpers.netmaking import NETS, conv, net, raw

__all__ = ["NETS"]

IMAGE = (2, 3, 8, 8)


@net((4, 12), a=Linear(12, 16), b=Linear(16, 12), c=Linear(12, 5))
def mlp(m: Any, x: Tensor) -> Tensor:
    return m.c(torch.relu(m.b(F.relu(m.a(x)))))


@net((2, 6, 12), a=Linear(12, 16, bias=False), b=Linear(16, 12), c=Linear(12, 5))
def tokens(m: Any, x: Tensor) -> Tensor:
    return m.c(F.relu(m.b(F.leaky_relu(m.a(x), 0.2)))).sum(1)


@net((2, 4, 12), a=nn.Conv1d(4, 12, 3, bias=False), n=nn.BatchNorm1d(12), b=nn.Conv1d(12, 10, 3),
     o=nn.BatchNorm1d(10), c=Linear(10, 3))  # fmt: skip
def chain_1d(m: Any, x: Tensor) -> Tensor:
    return m.c(F.leaky_relu(m.o(m.b(F.relu(m.n(m.a(x)))))).mean(-1))


@net(IMAGE, a=conv(3, 12, bias=False), n=BatchNorm2d(12), act=nn.ReLU(inplace=True), b=conv(12, 10),
     o=BatchNorm2d(10, affine=False), c=nn.Conv2d(10, 3, 1))  # fmt: skip
def chain_2d(m: Any, x: Tensor) -> Tensor:
    return m.c(m.act(m.o(m.b(m.act(m.n(m.a(x)))))))


@net((1, 2, 5, 5, 5), a=nn.Conv3d(2, 12, 3), n=nn.BatchNorm3d(12), b=nn.Conv3d(12, 8, 3), o=nn.BatchNorm3d(8),
     c=Linear(8, 3))  # fmt: skip
def chain_3d(m: Any, x: Tensor) -> Tensor:
    return m.c(F.relu(m.o(m.b(F.relu(m.n(m.a(x)))))).mean((2, 3, 4)))


@net(IMAGE, a=conv(3, 12), n=BatchNorm2d(12), b=conv(12, 10), p=nn.PReLU(10), c=conv(10, 8), o=BatchNorm2d(8),
     d=conv(8, 8), q=nn.PReLU(), e=Linear(8, 3))  # fmt: skip
def activations(m: Any, x: Tensor) -> Tensor:
    x = m.p(m.b(F.relu6(m.n(m.a(x)))))
    return m.e(m.q(m.d(F.gelu(m.o(m.c(x))))).mean((2, 3)))


@net(IMAGE, stem=conv(3, 12, bias=False), n=BatchNorm2d(12), a=conv(12, 16), an=BatchNorm2d(16), b=conv(16, 12),
     bn=BatchNorm2d(12), fc=Linear(12, 5))  # fmt: skip
def residual(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.n(m.stem(x)))
    x = F.relu(x + m.bn(m.b(F.relu(m.an(m.a(x))))))
    return m.fc(x.mean((2, 3)))


@net(IMAGE, stem=conv(3, 12), n=BatchNorm2d(12), a=conv(12, 14), o=BatchNorm2d(14), b=conv(14, 12),
     p=BatchNorm2d(12), fc=Linear(12, 5))  # fmt: skip
def preact(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = x + m.b(F.relu(m.o(m.a(F.relu(m.n(x))))))
    return m.fc(F.relu(m.p(x)).mean((2, 3)))


@net(IMAGE, stem=conv(3, 10), a=conv(10, 16, stride=2), an=BatchNorm2d(16), b=conv(16, 14), bn=BatchNorm2d(14),
     short=nn.Conv2d(10, 14, 1, 2, bias=False), sn=BatchNorm2d(14), fc=Linear(14, 5))  # fmt: skip
def projection(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.stem(x))
    return m.fc(F.relu(m.bn(m.b(F.relu(m.an(m.a(x))))) + m.sn(m.short(x))).mean((2, 3)))


@net(IMAGE, stem=conv(3, 12), a=conv(12, 12), b=nn.Conv2d(12, 12, 1), fc=Linear(12, 5))
def in_place(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.stem(x))
    y = m.a(x)
    y += x
    z = m.b(F.relu_(y))
    z.add_(y)
    return m.fc(z.mean((2, 3)))


@net(IMAGE, a=conv(3, 8), b=conv(8, 6), bn=BatchNorm2d(14), c=conv(14, 10), cn=BatchNorm2d(24), fc=Linear(24, 5))
def dense(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    x = torch.cat([x, m.b(x)], 1)
    x = torch.cat([x, m.c(F.relu(m.bn(x)))], 1)
    return m.fc(F.relu(m.cn(x)).mean((2, 3)))


@net(IMAGE, a=conv(3, 12), b=conv(24, 10), fc=Linear(10, 5))
def cat_itself(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    return m.fc(F.relu(m.b(torch.cat([x, x], 1))).mean((2, 3)))


@net(IMAGE, a=conv(3, 10), n=BatchNorm2d(10), fc=Linear(160, 12), o=Linear(12, 5))
def flatten(m: Any, x: Tensor) -> Tensor:
    return m.o(F.relu(m.fc(torch.flatten(F.max_pool2d(F.relu(m.n(m.a(x))), 2), 1))))


@net(IMAGE, a=conv(3, 10), fc=Linear(640, 12), o=Linear(12, 5))
def view(m: Any, x: Tensor) -> Tensor:
    return m.o(F.relu(m.fc(F.relu(m.a(x)).view(x.size(0), -1))))


@net(IMAGE, a=conv(3, 10), fc=Linear(160, 12), o=Linear(12, 5))
def reshape(m: Any, x: Tensor) -> Tensor:
    return m.o(F.relu(m.fc(F.avg_pool2d(F.relu(m.a(x)), 2).reshape(-1, 10 * 4 * 4))))


@net(IMAGE, a=conv(3, 10), fc=Linear(160, 12), o=Linear(12, 5))
def permuted(m: Any, x: Tensor) -> Tensor:
    return m.o(F.relu(m.fc(F.max_pool2d(F.relu(m.a(x)), 2).permute(0, 2, 3, 1).flatten(1))))


@net(IMAGE, a=nn.Conv2d(3, 12, 1, bias=False), n=BatchNorm2d(12), d=conv(12, 12, groups=12), dn=BatchNorm2d(12),
     b=nn.Conv2d(12, 8, 1), bn=BatchNorm2d(8), fc=Linear(8, 5))  # fmt: skip
def depthwise(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.dn(m.d(F.relu(m.n(m.a(x))))))
    return m.fc(m.bn(m.b(x)).mean((2, 3)))


@net(IMAGE, a=conv(3, 10), d=conv(10, 20, groups=10), dn=BatchNorm2d(20), b=conv(20, 8), fc=Linear(8, 5))
def multiplier(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.relu(m.b(F.relu(m.dn(m.d(F.relu(m.a(x))))))).mean((2, 3)))


@net(IMAGE, a=conv(3, 12), n=BatchNorm2d(12), up=nn.ConvTranspose2d(12, 12, 4, 2, 1, groups=12), un=BatchNorm2d(12),
     b=conv(12, 8), fc=Linear(8, 5))  # fmt: skip
def upsampled_depthwise(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.relu(m.b(F.relu(m.un(m.up(F.relu(m.n(m.a(x)))))))).mean((2, 3)))


@net(IMAGE, a=conv(3, 16), g=conv(16, 16, groups=4), n=BatchNorm2d(16), h=conv(16, 12, groups=2), fc=Linear(12, 5))
def grouped(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.relu(m.h(F.relu(m.n(m.g(F.relu(m.a(x))))))).mean((2, 3)))


@net(IMAGE, a=conv(3, 16), b=nn.Conv2d(16, 16, 1, groups=2), n=BatchNorm2d(16), c=conv(16, 16, groups=2),
     fc=Linear(16, 5))  # fmt: skip
def shuffle(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.n(m.b(F.relu(m.a(x)))))
    b, c, h, w = x.shape
    x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
    return m.fc(F.relu(m.c(x)).mean((2, 3)))


@net((4, 10), a=Linear(10, 12), twice=Linear(12, 12), b=Linear(12, 5))
def twice(m: Any, x: Tensor) -> Tensor:
    return m.b(F.relu(m.twice(F.relu(m.twice(F.relu(m.a(x)))))))


@net(IMAGE, w1=raw(12, 3, 3, 3), b1=raw(12), mean=torch.zeros(12), var=torch.zeros(12), gamma=raw(12), beta=raw(12),
     w2=raw(10, 12, 3, 3), w3=raw(14, 10), b3=raw(14), w4=raw(5, 14), b4=raw(5))  # fmt: skip
def functional(m: Any, x: Tensor) -> Tensor:
    x = F.conv2d(x, m.w1, m.b1, padding=1)
    x = F.relu(F.batch_norm(x, m.mean, m.var, m.gamma, m.beta, False, 0.1, 1e-3))
    x = F.relu(F.conv2d(x, m.w2, None, 1, 1)).mean((2, 3))
    return F.linear(F.relu(F.linear(x, m.w3, m.b3)), m.w4, bias=m.b4)


@net(IMAGE, a=conv(3, 12), scale=raw(12, 1, 1), b=conv(12, 10), offset=raw(1, 10, 1, 1), c=conv(10, 8), scale2=raw(8),
     fc=Linear(8, 5))  # fmt: skip
def raw_parameters(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.a(x)) * m.scale
    x = F.relu(m.b(x) + m.offset)
    return m.fc(F.relu(m.c(x)).mean((2, 3)) / m.scale2)


@net(IMAGE, a=conv(3, 16), n=BatchNorm2d(16), b=conv(8, 10), c=conv(8, 10), fc=Linear(10, 5))
def chunked(m: Any, x: Tensor) -> Tensor:
    left, right = m.n(m.a(x)).chunk(2, 1)
    return m.fc(F.relu(m.b(F.relu(left)) + m.c(right)).mean((2, 3)))


@net(IMAGE, a=conv(3, 16), b=conv(6, 8), c=conv(10, 8), fc=Linear(16, 5))
def sliced(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    return m.fc(torch.cat([F.relu(m.b(x[:, :6])), F.relu(m.c(x[:, 6:]))], dim=1).mean((2, 3)))


@net(IMAGE, a=conv(3, 12), n=BatchNorm2d(12), s=nn.Conv2d(12, 8, 1), e=nn.Conv2d(8, 12, 1), b=conv(12, 10),
     fc=Linear(10, 5))  # fmt: skip
def gate(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.n(m.a(x)))
    x = x * torch.sigmoid(m.e(F.relu(m.s(F.adaptive_avg_pool2d(x, 1)))))
    return m.fc(F.relu(m.b(x)).mean((2, 3)))


@net(IMAGE, a=conv(3, 12), b=conv(12, 12), c=conv(12, 10), fc=Linear(10, 5))
def pinned_branch(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.relu(m.c(torch.cumsum(m.b(F.relu(m.a(x))), 1))).mean((2, 3)))


@net((2, 3, 16, 16), a=conv(3, 12), mp=nn.MaxPool2d(2), b=conv(12, 10), ap=nn.AvgPool2d(2), d=nn.Dropout2d(0.5),
     c=conv(10, 8), up=nn.Upsample(scale_factor=2), gp=nn.AdaptiveAvgPool2d((1, 1)), fc=Linear(8, 5))  # fmt: skip
def pooling(m: Any, x: Tensor) -> Tensor:
    x = m.d(m.ap(F.relu(m.b(m.mp(F.relu(m.a(x)))))))
    return m.fc(F.dropout(m.gp(m.up(F.relu(m.c(x)))).flatten(1), 0.2, m.training))


@net(IMAGE, a=conv(3, 12), b=conv(12, 12), c=conv(12, 10), d=conv(12, 10))
def two_outputs(m: Any, x: Tensor) -> dict[str, Any]:
    x = F.relu(m.a(x))
    y = F.relu(m.b(x)) - x
    return {"one": m.c(y), "more": [m.d(y), y.shape[0]]}


@net(IMAGE, a=conv(3, 12, padding_mode="reflect"), n=BatchNorm2d(12), b=conv(12, 16, padding_mode="circular"),
     c=conv(4, 8), fc=Linear(8, 5))  # fmt: skip
def pixels(m: Any, x: Tensor) -> Tensor:
    x = F.pixel_shuffle(F.relu(m.b(m.n(m.a(x)))), 2)
    return m.fc(F.relu(m.c(x)).mean((2, 3)))


@net((2, 10), a=Linear(10, 12), b=Linear(10, 12), c=Linear(12, 8), d=Linear(12, 8), fc=Linear(8, 5))
def stacked(m: Any, x: Tensor) -> Tensor:
    both = torch.stack([F.relu(m.a(x)), F.relu(m.b(x))], 1)
    one, other = both.unbind(1)
    return m.fc(F.relu(m.c(one) * 0.5 + m.d(other)) + m.c(both.mean(1)))


@net((2, 6, 10), a=Linear(10, 16), n=LayerNorm(16), qkv=Linear(16, 48), o=Linear(16, 16), n2=LayerNorm(16),
     up=Linear(16, 24), down=Linear(24, 16), fc=Linear(16, 5))  # fmt: skip
def encoder(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    b, t, c = x.shape
    q, k, v = m.qkv(m.n(x)).view(b, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
    x = x + m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))
    x = x + m.down(F.gelu(m.up(m.n2(x))))
    return m.fc(x.mean(1))


@net((2, 6, 10), q=Linear(10, 12), k=Linear(10, 12, bias=False), v=Linear(10, 12), o=Linear(12, 10), fc=Linear(10, 5))
def scores(m: Any, x: Tensor) -> Tensor:
    q, k, v = (part(x).view(-1, 6, 2, 6).transpose(1, 2) for part in (m.q, m.k, m.v))
    weights = (q @ k.transpose(-2, -1) * 6**-0.5).softmax(-1)
    x = m.o(torch.matmul(weights, v).transpose(1, 2).flatten(2))
    return m.fc(F.relu(x).sum(1))


@net((2, 6), words=9, e=nn.Embedding(9, 12), position=raw(6, 12), a=Linear(12, 16), b=Linear(16, 12), fc=Linear(12, 5))
def words(m: Any, x: Tensor) -> Tensor:
    x = m.e(x) + m.position
    return m.fc((x + m.b(F.relu(m.a(x)))).amax(1))


@net(IMAGE, a=conv(3, 12), b=conv(12, 16, stride=2), n=nn.GroupNorm(4, 16), up=nn.ConvTranspose2d(16, 10, 2, 2),
     c=conv(22, 8), o=nn.InstanceNorm2d(8, affine=True, eps=1e-12), fc=nn.Conv2d(8, 2, 1))  # fmt: skip
def unet(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    y = F.relu(m.up(F.relu(m.n(m.b(x)))))
    return m.fc(F.relu(m.o(m.c(torch.cat([x, y], 1)))))


@net(IMAGE, a=conv(3, 12, bias=False), n=BatchNorm2d(12), b=conv(12, 6), fc=Linear(6, 5))
def towers(m: Any, x: Tensor) -> Tensor:
    one, other = (m.b(F.relu(m.n(m.a(side)))) for side in (x, x.flip(3).roll(1, 2)))
    return m.fc(F.relu(one - other).mean((2, 3)))


@net(IMAGE, a=conv(3, 12, bias=False), n=BatchNorm2d(12, track_running_stats=False, eps=1e-12),
     b=conv(12, 10, bias=False), o=nn.InstanceNorm2d(10, affine=True, eps=1e-12), fc=nn.Conv2d(10, 3, 1))  # fmt: skip
def own_statistics(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.relu(m.o(m.b(F.relu(m.n(m.a(x))))))).amax((2, 3))


@net(IMAGE, stem=conv(3, 8), qkv=nn.Conv2d(8, 24, 1, bias=False), n=BatchNorm2d(24), pe=conv(12, 12, groups=12),
     proj=nn.Conv2d(12, 6, 1), fc=Linear(6, 5))  # fmt: skip
def one_norm_for_all(m: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of two heads, behind one BatchNorm."""
    b, _, h, w = x.shape
    q, k, v = m.n(m.qkv(F.relu(m.stem(x)))).view(b, 2, 12, h * w).split([3, 3, 6], 2)
    scores = (q.transpose(2, 3) @ k).softmax(-1)
    y = (v @ scores.transpose(2, 3)).reshape(b, 12, h, w) + m.pe(v.reshape(b, 12, h, w))
    return m.fc(F.relu(m.proj(y)).mean((2, 3)))


@net((2, 6, 12), a=Linear(12, 40), d=Linear(20, 12), g=Linear(12, 16), u=Linear(12, 16), o=Linear(16, 5))
def gated(m: Any, x: Tensor) -> Tensor:
    x = m.d(F.glu(m.a(x)))
    return m.o(F.silu(m.g(x)) * m.u(x)).mean(1)
