"""The networks in PyTorch, with the keys of its zoos: what the tests hold the Flax ones against.

Every network's forward returns (logits, features, embedding, preactivations), NCHW, as rkd_jax.models.Outputs has them.
"""

import torch
from torch import nn
from torch.nn import functional as F


def conv_bn(channels, features, kernel=3, stride=1, groups=1, bias=False, padding=None):
    padding = kernel // 2 if padding is None else padding
    return (
        nn.Conv2d(channels, features, kernel, stride, padding, groups=groups, bias=bias),
        nn.BatchNorm2d(features),
    )


class Residual(nn.Module):
    """A basic block or, with a bottleneck, three convolutions."""

    def __init__(self, channels, features, stride, bottleneck, shortcut):
        super().__init__()
        if bottleneck:
            self.conv1, self.bn1 = conv_bn(channels, features // 4, 1)
            self.conv2, self.bn2 = conv_bn(features // 4, features // 4, 3, stride)
            self.conv3, self.bn3 = conv_bn(features // 4, features, 1)
        else:
            self.conv1, self.bn1 = conv_bn(channels, features, 3, stride)
            self.conv2, self.bn2 = conv_bn(features, features)
        self.bottleneck, self.shortcut_name = bottleneck, shortcut
        if stride != 1 or channels != features:
            setattr(self, shortcut, nn.Sequential(*conv_bn(channels, features, 1, stride)))

    def preactivation(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        return y + getattr(self, self.shortcut_name, nn.Identity())(x)

    def forward(self, x):
        return F.relu(self.preactivation(x))


class ResNet(nn.Module):
    def __init__(self, num_classes, blocks, widths, bottleneck=False, shortcut="downsample", head="fc"):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, widths[0])
        self.stages, self.head = len(blocks), head
        for stage, count in enumerate(blocks, start=1):
            layers = [
                Residual(
                    widths[stage - (i == 0)], widths[stage], 2 if stage > 1 and i == 0 else 1, bottleneck, shortcut
                )
                for i in range(count)
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        setattr(self, head, nn.Linear(widths[-1], num_classes))

    def forward(self, x):
        preactivations = [self.bn1(self.conv1(x))]
        features = [F.relu(preactivations[0])]
        for stage in range(1, self.stages + 1):
            x, (*blocks, last) = features[-1], getattr(self, f"layer{stage}")
            for block in blocks:
                x = block(x)
            preactivations.append(last.preactivation(x))
            features.append(F.relu(preactivations[-1]))
        embedding = features[-1].mean((2, 3))
        return getattr(self, self.head)(embedding), features, embedding, preactivations


class WideBlock(nn.Module):
    def __init__(self, channels, features, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1, self.bn2 = conv_bn(channels, features, 3, stride)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        if channels != features:
            self.convShortcut = nn.Conv2d(channels, features, 1, stride, bias=False)

    def forward(self, x):
        return self.after(x, self.bn1(x))

    def after(self, x, preactivation):
        y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(preactivation)))))
        return y + (self.convShortcut(F.relu(preactivation)) if hasattr(self, "convShortcut") else x)


class WideStage(nn.Module):
    def __init__(self, channels, features, count, stride):
        super().__init__()
        self.layer = nn.Sequential(
            *[WideBlock(features if i else channels, features, 1 if i else stride) for i in range(count)]
        )


class WideResNet(nn.Module):
    def __init__(self, num_classes, depth, width):
        super().__init__()
        count = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(16, 16 * width, count, 1)
        self.block2 = WideStage(16 * width, 32 * width, count, 2)
        self.block3 = WideStage(32 * width, 64 * width, count, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)

    def forward(self, x):
        features, preactivations = [self.conv1(x)], []
        for stage in (self.block1, self.block2, self.block3):
            x, (first, *blocks) = features[-1], stage.layer
            preactivations.append(first.bn1(x))
            x = first.after(x, preactivations[-1])
            for block in blocks:
                x = block(x)
            features.append(x)
        preactivations.append(self.bn1(features[-1]))
        embedding = F.relu(preactivations[-1]).mean((2, 3))
        return self.fc(embedding), features, embedding, preactivations


class VGG(nn.Module):
    def __init__(self, num_classes, counts):
        super().__init__()
        channels = 3
        for block, (count, features) in enumerate(zip(counts, (64, 128, 256, 512, 512), strict=True)):
            layers = []
            for _ in range(count):
                layers += [*conv_bn(channels, features, bias=True), nn.ReLU()]
                channels = features
            setattr(self, f"block{block}", nn.Sequential(*layers[:-1]))
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, x):
        large, features, preactivations = x.shape[-1] >= 64, [], []
        for block in range(5):
            preactivations.append(getattr(self, f"block{block}")(x))
            features.append(F.relu(preactivations[-1]))
            x = F.max_pool2d(features[-1], 2) if block < 3 or large else features[-1]
        embedding = features[-1].mean((2, 3))
        return self.classifier(embedding), features, embedding, preactivations


def inverted_residual(channels, features, stride, expansion, activation, bias):
    wide = channels * expansion
    return nn.Sequential(
        *conv_bn(channels, wide, 1, bias=bias),
        activation(),
        *conv_bn(wide, wide, 3, stride, wide, bias=bias),
        activation(),
        *conv_bn(wide, features, 1, bias=bias),
    )


class Inverted(nn.Module):
    def __init__(self, channels, features, stride, expansion, name, activation, bias):
        super().__init__()
        self.name, self.skip = name, stride == 1 and channels == features
        setattr(self, name, inverted_residual(channels, features, stride, expansion, activation, bias))

    def forward(self, x):
        y = getattr(self, self.name)(x)
        return x + y if self.skip else y


class MobileNetV2(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Sequential(*conv_bn(3, 16, 3, 2), nn.ReLU())
        self.blocks, channels = nn.ModuleList(), 16
        plan = zip((16, 24, 32, 64, 96, 160, 320), (1, 2, 3, 4, 3, 3, 1), (1, 1, 2, 2, 1, 2, 1), strict=True)
        for full, count, stride in plan:
            stage = []
            for i in range(count):
                expansion = 1 if full == 16 else 6
                stage.append(Inverted(channels, full // 2, 1 if i else stride, expansion, "conv", nn.ReLU, False))
                channels = full // 2
            self.blocks.append(nn.Sequential(*stage))
        self.conv2 = nn.Sequential(*conv_bn(160, 1280, 1), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))

    def forward(self, x):
        stem = self.conv1[:2](x)
        features, preactivations, x = [F.relu(stem)], [stem], F.relu(stem)
        for stage, block in enumerate(self.blocks):
            x = block(x)
            if stage in (1, 2, 4, 6):
                features.append(x)
                preactivations.append(x)
        embedding = self.conv2(x).mean((2, 3))
        return self.classifier(embedding), features, embedding, preactivations


class MobileNetV2At64(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.pre = nn.Sequential(*conv_bn(3, 32, 1, bias=True, padding=1), nn.ReLU6())
        channels = 32
        plan = zip((16, 24, 32, 64, 96, 160, 320), (1, 2, 3, 4, 3, 3, 1), (1, 2, 2, 2, 1, 1, 1), strict=True)
        for stage, (features, count, stride) in enumerate(plan, start=1):
            blocks = []
            for i in range(count):
                expansion = 1 if stage == 1 else 6
                blocks.append(Inverted(channels, features, 1 if i else stride, expansion, "residual", nn.ReLU6, True))
                channels = features
            setattr(self, f"stage{stage}", nn.Sequential(*blocks) if count > 1 else blocks[0])
        self.conv1 = nn.Sequential(*conv_bn(320, 1280, 1, bias=True), nn.ReLU6())
        self.conv2 = nn.Conv2d(1280, num_classes, 1)

    def forward(self, x):
        stem = self.pre[:2](x)
        features, preactivations, x = [F.relu6(stem)], [stem], F.relu6(stem)
        for stage in range(1, 8):
            x = getattr(self, f"stage{stage}")(x)
            if stage in (2, 3, 4):
                features.append(x)
                preactivations.append(x)
        last = self.conv1[:2](x)
        embedding = F.relu6(last).mean((2, 3))
        logits = self.conv2(embedding[..., None, None]).flatten(1)
        return logits, [*features, F.relu6(last)], embedding, [*preactivations, last]


def shuffle(x, groups):
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleV1Block(nn.Module):
    def __init__(self, channels, features, stride):
        super().__init__()
        features = features - channels if stride == 2 else features
        middle, self.groups, self.stride = features // 4, 1 if channels == 24 else 3, stride
        self.conv1, self.bn1 = conv_bn(channels, middle, 1, groups=self.groups)
        self.conv2, self.bn2 = conv_bn(middle, middle, 3, stride, middle)
        self.conv3, self.bn3 = conv_bn(middle, features, 1, groups=3)

    def forward(self, x):
        y = shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        self.preactivation = torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1) if self.stride == 2 else x + y
        return F.relu(self.preactivation)


class ShuffleV2Basic(nn.Module):
    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = conv_bn(half, half, 1)
        self.conv2, self.bn2 = conv_bn(half, half, 3, 1, half)
        self.conv3, self.bn3 = conv_bn(half, half, 1)

    def forward(self, x):
        passed, y = x.chunk(2, 1)
        y = self.bn3(self.conv3(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(y)))))))
        self.preactivation = shuffle(torch.cat([passed, y], 1), 2)
        return shuffle(torch.cat([passed, F.relu(y)], 1), 2)


class ShuffleV2Down(nn.Module):
    def __init__(self, channels, features):
        super().__init__()
        half = features // 2
        self.conv1, self.bn1 = conv_bn(channels, channels, 3, 2, channels)
        self.conv2, self.bn2 = conv_bn(channels, half, 1)
        self.conv3, self.bn3 = conv_bn(channels, half, 1)
        self.conv4, self.bn4 = conv_bn(half, half, 3, 2, half)
        self.conv5, self.bn5 = conv_bn(half, half, 1)

    def forward(self, x):
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return shuffle(torch.cat([left, right], 1), 2)


class Shuffle(nn.Module):
    """ShuffleNet, version 1 or 2: stages of given first and further blocks."""

    def __init__(self, num_classes, stages, last):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 24, 1)
        for i, stage in enumerate(stages, start=1):
            setattr(self, f"layer{i}", nn.Sequential(*stage))
        self.last = last
        if last == 1024:
            self.conv2, self.bn2 = conv_bn(464, 1024, 1)
        self.linear = nn.Linear(last, num_classes)

    def forward(self, x):
        preactivations = [self.bn1(self.conv1(x))]
        features = [F.relu(preactivations[0])]
        for layer in (self.layer1, self.layer2, self.layer3):
            features.append(layer(features[-1]))
            preactivations.append(layer[-1].preactivation)
        x = F.relu(self.bn2(self.conv2(features[-1]))) if self.last == 1024 else features[-1]
        embedding = x.mean((2, 3))
        return self.linear(embedding), features, embedding, preactivations


def shuffle_v1(num_classes):
    widths, counts = (24, 240, 480, 960), (4, 8, 4)
    stages = [
        [ShuffleV1Block(widths[s] if i == 0 else widths[s + 1], widths[s + 1], 1 if i else 2) for i in range(counts[s])]
        for s in range(3)
    ]
    return Shuffle(num_classes, stages, 960)


def shuffle_v2(num_classes):
    widths, counts = (24, 116, 232, 464), (3, 7, 3)
    stages = [
        [ShuffleV2Down(widths[s], widths[s + 1]), *(ShuffleV2Basic(widths[s + 1]) for _ in range(counts[s]))]
        for s in range(3)
    ]
    return Shuffle(num_classes, stages, 1024)


def create(name, num_classes):
    """The network that `rkd_jax.models.create` calls by that name."""
    if name.startswith("wrn"):
        _, depth, width = name.split("_")
        return WideResNet(num_classes, int(depth), int(width))
    if name.startswith("vgg"):
        counts = {"8": (1,) * 5, "11": (1, 1, 2, 2, 2), "13": (2,) * 5, "16": (2, 2, 3, 3, 3), "19": (2, 2, 4, 4, 4)}
        return VGG(num_classes, counts[name[3:]])
    if name.startswith("resnet"):
        depth, _, wide = name.removeprefix("resnet").partition("x")
        widths = (32, 64, 128, 256) if wide else (16, 16, 32, 64)
        return ResNet(num_classes, ((int(depth) - 2) // 6,) * 3, widths)
    if name.startswith("ResNet"):
        blocks = {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3), "50": (3, 4, 6, 3), "101": (3, 4, 23, 3)}[name[6:]]
        bottleneck = name in ("ResNet50", "ResNet101")
        widths = (64, *(width * (4 if bottleneck else 1) for width in (64, 128, 256, 512)))
        return ResNet(num_classes, blocks, widths, bottleneck, "shortcut", "linear")
    others = {
        "MobileNetV2": MobileNetV2,
        "MobileNetV2_64x64": MobileNetV2At64,
        "ShuffleV1": shuffle_v1,
        "ShuffleV2": shuffle_v2,
    }
    return others[name](num_classes)
