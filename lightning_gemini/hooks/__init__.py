"""What our Strategies do in Lightning's hooks: joining and leaving a job, and stepping. Mixed into Lightning's own strategies."""
