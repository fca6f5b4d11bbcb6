"""Events that embed their context, as the earlier system wrote them, turned into events that refer to theirs."""
