"""Generated rooms, streets and faces in the layouts of NYUv2, CityScapes and CelebA: a stand-in, no benchmark."""

from recipes.scenes.writers import write_celeba, write_cityscapes, write_nyuv2

__all__ = ["write_celeba", "write_cityscapes", "write_nyuv2"]
