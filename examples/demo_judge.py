"""How positive a text is, by a lexicon: the judge of the demo, which never enters PPO."""

from __future__ import annotations

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ANALYSER = SentimentIntensityAnalyzer()


def judge(prompts: list[str], completions: list[str]) -> list[float]:
    """VADER's compound score of each completion, in [-1, 1].

    Source: Hutto and Gilbert 2014, VADER: A Parsimonious Rule-based Model for Sentiment Analysis.
    """
    return [ANALYSER.polarity_scores(text)["compound"] for text in completions]
