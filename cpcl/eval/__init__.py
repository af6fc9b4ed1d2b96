"Scores of a retrieval, their intervals over people, re-ranking, and the quality of labels."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    scores="METRICS QueryScores Scores evaluate score_matrix",
    label_quality="LabelQuality MiningReport mining_report pair_quality quality_of",
    intervals="bootstrap_interval method_interval difference_interval share_interval "
    "welch_interval mean_difference_interval pooled_share_interval",
    reranking="rerank",
)
