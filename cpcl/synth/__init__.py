"A drawing program: people, cameras and sentences about them, written in the benchmarks' layouts."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    dataset="SynthWorld write_synth checksum",
    people="Person draw_person twin",
    shots="Shot draw_shot",
    captions="Annotator caption",
    camera="Camera picture",
)
