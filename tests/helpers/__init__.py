"""What several tests share: nets, samples of each rule, and processes of their own."""
