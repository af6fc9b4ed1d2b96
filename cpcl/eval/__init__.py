"Scores of a retrieval, their intervals over people, and re-ranking."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    scores="METRICS QueryScores Scores evaluate score_matrix rerank",
    intervals="bootstrap_interval paired_bootstrap",
)
