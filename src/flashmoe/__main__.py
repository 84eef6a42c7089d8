from flashmoe.cli import main

main()
